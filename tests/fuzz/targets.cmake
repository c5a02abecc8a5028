# The fuzz targets: TARGET.cpp defines LLVMFuzzerTestOneInput, corpus/TARGET has its first inputs.
set(fuzz_targets adapter_config safetensors save_journal)
get_filename_component(csrc ${CMAKE_CURRENT_LIST_DIR}/../../csrc ABSOLUTE)
include(${csrc}/cmake/RankwiseJson.cmake)

# The torch-free readers that they exercise, built without torch.
set(io adapter_config adapter_config_json adapter_key adapter_layout bounded_json json_fields
  method_json module_pattern pattern_index posix_file safetensors safetensors_json save_journal)
list(TRANSFORM io REPLACE "(.+)" "${csrc}/io/\\0.cpp")
add_library(fuzzed_io STATIC ${io})
target_include_directories(fuzzed_io PUBLIC ${csrc} ${csrc}/include)
target_link_libraries(fuzzed_io PUBLIC rankwise_json)

# The executable TARGET_SUFFIX of each target, with further sources.
function(rankwise_fuzz_targets suffix)
  foreach(target IN LISTS fuzz_targets)
    add_executable(${target}_${suffix} ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/${target}.cpp ${ARGN})
    target_compile_options(${target}_${suffix} PRIVATE -Wall -Wextra -Werror)
    target_link_libraries(${target}_${suffix} PRIVATE fuzzed_io)
  endforeach()
endfunction()
