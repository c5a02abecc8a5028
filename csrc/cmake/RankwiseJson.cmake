# The headers of nlohmann-json for csrc/io: a CMake package, or the PyPI package nlohmann-json.
add_library(rankwise_json INTERFACE)
find_package(nlohmann_json 3.11 QUIET)
if(nlohmann_json_FOUND)
  target_link_libraries(rankwise_json INTERFACE nlohmann_json::nlohmann_json)
else()
  if(NOT RANKWISE_JSON_INCLUDE_DIR)
    find_program(RANKWISE_PYTHON NAMES python3 python)
    execute_process(COMMAND ${RANKWISE_PYTHON} -c
      "import importlib.util as u; print(u.find_spec('nlohmann_json').submodule_search_locations[0])"
      OUTPUT_VARIABLE json_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    find_path(RANKWISE_JSON_INCLUDE_DIR nlohmann/json.hpp
      PATHS ${json_package}/include ${json_package}/single_include)
  endif()
  if(NOT RANKWISE_JSON_INCLUDE_DIR)
    message(FATAL_ERROR "nlohmann-json was not found: pip install nlohmann-json, "
      "or set RANKWISE_JSON_INCLUDE_DIR to the folder that holds nlohmann/json.hpp")
  endif()
  target_include_directories(rankwise_json SYSTEM INTERFACE ${RANKWISE_JSON_INCLUDE_DIR})
endif()
