# The fuzz targets: TARGET.cpp defines LLVMFuzzerTestOneInput, corpus/TARGET has its first inputs.
# What they exercise is built without torch, but for allocator_state.
set(fuzz_targets adapter_config safetensors save_journal allocator_state)
get_filename_component(csrc ${CMAKE_CURRENT_LIST_DIR}/../../csrc ABSOLUTE)
include(${csrc}/cmake/RankwiseJson.cmake)

set(io adapter_config adapter_config_json adapter_key adapter_layout bounded_json json_fields
  method_json module_pattern pattern_index posix_file safetensors safetensors_json save_journal)
list(TRANSFORM io REPLACE "(.+)" "${csrc}/io/\\0.cpp")
add_library(fuzzed_io STATIC ${io})
target_include_directories(fuzzed_io PUBLIC ${csrc} ${csrc}/include)
target_link_libraries(fuzzed_io PUBLIC rankwise_json)

# The executable TARGET_SUFFIX of each target, with further sources; `allocators` has the allocators.
function(rankwise_fuzz_targets suffix allocators)
  foreach(target IN LISTS fuzz_targets)
    add_executable(${target}_${suffix} ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/${target}.cpp ${ARGN})
    target_compile_options(${target}_${suffix} PRIVATE -Wall -Wextra -Werror)
    if(target STREQUAL allocator_state)
      target_link_libraries(${target}_${suffix} PRIVATE ${allocators})
    else()
      target_link_libraries(${target}_${suffix} PRIVATE fuzzed_io)
    endif()
  endforeach()
endfunction()
