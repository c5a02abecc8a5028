# The CUDA kernels compiled for the CPU against the execution model, and their tests. CUDA's headers
# are enough: torch's wheel for CUDA brings them, and so does a CUDA toolkit.
find_path(cuda_headers cuda_bf16.h
  HINTS ${LibTorch_LIBRARY_DIR}/../../nvidia/cu13/include /usr/local/cuda/include)
if(NOT cuda_headers)
  message(WARNING "rankwise: no CUDA headers were found; the kernel tests are not built")
endif()

# Alignment, array bounds and overflows are checked as well; fibers leave no room for more. Device
# code looks at registers as words, pairs and values, which g++ may not take for different memory.
set(kernel_test_options -O2 -g1 -Wall -Wextra -Werror -Wno-unknown-pragmas -U_FORTIFY_SOURCE
  -fno-strict-aliasing -fno-sanitize-recover=all
  -fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero
  -fsanitize=float-cast-overflow,return,bool,enum)

function(rankwise_kernel_target target)
  target_compile_definitions(${target} PRIVATE RANKWISE_CUDA_MODEL)
  target_include_directories(${target} PRIVATE ${repository}/tests/cpp ${repository}/csrc)
  target_include_directories(${target} SYSTEM PRIVATE ${cuda_headers})
  target_compile_options(${target} PRIVATE ${kernel_test_options})
endfunction()

# One executable per test file, with the kernel files it runs.
function(rankwise_kernel_test path)
  if(NOT cuda_headers)
    return()
  endif()
  string(REGEX REPLACE "[/.]" "_" name ${path})
  list(TRANSFORM ARGN PREPEND ${repository}/csrc/kernels/ OUTPUT_VARIABLE kernels)
  set_source_files_properties(${kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
  add_executable(${name} ${path}.cpp ${kernels})
  rankwise_kernel_target(${name})
  target_link_libraries(${name} PRIVATE cuda_model GTest::gmock GTest::gtest_main)
  add_test(NAME ${path} COMMAND ${name})
endfunction()

if(cuda_headers)
  add_library(cuda_model STATIC cuda_model/async_copies.cpp cuda_model/device_memory.cpp
    cuda_model/fibers.cpp cuda_model/grid.cpp cuda_model/shared_barriers.cpp
    cuda_model/shared_memory.cpp cuda_model/tensor_copies.cpp cuda_model/tensor_core.cpp
    cuda_model/warp.cpp cuda_model/warpgroup.cpp)
  rankwise_kernel_target(cuda_model)
  target_link_options(cuda_model PUBLIC -fsanitize=undefined)
endif()

rankwise_kernel_test(cuda_model/grid_test)
rankwise_kernel_test(cuda_model/hopper_test)
rankwise_kernel_test(cuda_model/warp_test)
rankwise_kernel_test(kernels/dropout_mask_test dropout_mask.cu)
rankwise_kernel_test(kernels/allocation/importance_kernels_test allocation/importance.cu)
rankwise_kernel_test(kernels/lora_embedding_test expand.cu lora_embedding.cu)
set(lora_linear_kernels column_products.cu expand.cu finish.cu lora_linear.cu output_products.cu
  row_products.cu)
rankwise_kernel_test(kernels/lora_linear_test dropout_mask.cu ${lora_linear_kernels})
rankwise_kernel_test(kernels/lora_linear_accuracy_test ${lora_linear_kernels})
rankwise_kernel_test(kernels/lora_linear_nonfinite_test ${lora_linear_kernels})
rankwise_kernel_test(kernels/lora_linear_term_test hopper/linear_product.cu split_term.cu
  ${lora_linear_kernels})
rankwise_kernel_test(kernels/allocation/orthogonality_test allocation/orthogonality.cu)
rankwise_kernel_test(kernels/allocation/progress_test allocation/progress.cu)
rankwise_kernel_test(kernels/allocation/triplet_selection_test allocation/triplet_selection.cu)
rankwise_kernel_test(kernels/hopper/linear_product_test hopper/linear_product.cu)
rankwise_kernel_test(kernels/hopper/linear_product_beside_test finish.cu hopper/linear_product.cu
  split_term.cu)
rankwise_kernel_test(kernels/hopper/split_term_test hopper/linear_product.cu split_term.cu)
# Includes the kernel's source.
rankwise_kernel_test(kernels/hopper/linear_product_faults_test finish.cu split_term.cu)
