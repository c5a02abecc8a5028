# Finds LibTorch by its files: targets LibTorch::LibTorch, ::Python (pybind11 modules), ::CUDA.
#
# Torch's own TorchConfig.cmake demands a CUDA toolkit whenever torch was built with CUDA, even of a
# program that compiles no CUDA, and adds flags to every target. This asks for nothing but torch.
# Looks at LibTorch_ROOT, the Torch_DIR and CMAKE_PREFIX_PATH a Torch user already sets, a torch
# package beside this file's own package, and last the torch of the first Python on the path.
include(FindPackageHandleStandardArgs)

set(candidates ${LibTorch_ROOT} $ENV{LibTorch_ROOT})
if(Torch_DIR)
  list(APPEND candidates ${Torch_DIR}/../../..)
endif()
foreach(prefix IN LISTS CMAKE_PREFIX_PATH)
  list(APPEND candidates ${prefix} ${prefix}/../..)  # torch.utils.cmake_prefix_path is share/cmake
endforeach()
list(APPEND candidates ${CMAKE_CURRENT_LIST_DIR}/../../../../torch)

find_path(LibTorch_INCLUDE_DIR torch/csrc/api/include/torch/torch.h
  PATHS ${candidates} PATH_SUFFIXES include NO_DEFAULT_PATH)
if(NOT LibTorch_INCLUDE_DIR)
  find_program(LibTorch_PYTHON NAMES python3 python)
  if(LibTorch_PYTHON)
    execute_process(
      COMMAND ${LibTorch_PYTHON} -c
        "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
      OUTPUT_VARIABLE torch_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    find_path(LibTorch_INCLUDE_DIR torch/csrc/api/include/torch/torch.h
      PATHS ${torch_package} PATH_SUFFIXES include NO_DEFAULT_PATH)
  endif()
endif()

if(LibTorch_INCLUDE_DIR)
  get_filename_component(torch_root ${LibTorch_INCLUDE_DIR}/.. REALPATH)
  set(LibTorch_LIBRARY_DIR ${torch_root}/lib)
  file(STRINGS ${LibTorch_INCLUDE_DIR}/torch/headeronly/version.h lines
    REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE "[^0-9]+" "." LibTorch_VERSION "${lines}")
  string(REGEX REPLACE "^\\.|\\.$" "" LibTorch_VERSION "${LibTorch_VERSION}")
  foreach(name c10 torch_cpu torch c10_cuda torch_cuda torch_python)
    find_library(LibTorch_${name}_LIBRARY ${name} PATHS ${LibTorch_LIBRARY_DIR} NO_DEFAULT_PATH)
  endforeach()
endif()

if(LibTorch_INCLUDE_DIR)
  # A wheel brings its own copy; a torch of a distribution uses the system's.
  find_library(LibTorch_gomp_LIBRARY NAMES libgomp.so.1 HINTS ${LibTorch_LIBRARY_DIR})
endif()

find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_c10_LIBRARY LibTorch_torch_cpu_LIBRARY LibTorch_torch_LIBRARY
    LibTorch_INCLUDE_DIR
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE "Set LibTorch_ROOT (or CMAKE_PREFIX_PATH) to the torch folder.")

if(LibTorch_FOUND AND NOT TARGET LibTorch::LibTorch)
  find_package(Threads REQUIRED)
  add_library(LibTorch::LibTorch INTERFACE IMPORTED)
  target_include_directories(LibTorch::LibTorch SYSTEM INTERFACE ${LibTorch_INCLUDE_DIR}
    ${LibTorch_INCLUDE_DIR}/torch/csrc/api/include)
  # libtorch names no symbol of its own but loads the CUDA backend where there is one.
  target_link_libraries(LibTorch::LibTorch INTERFACE
    -Wl,--push-state,--no-as-needed ${LibTorch_torch_LIBRARY} -Wl,--pop-state
    ${LibTorch_torch_cpu_LIBRARY} ${LibTorch_c10_LIBRARY} Threads::Threads)
  if(LibTorch_torch_cuda_LIBRARY)
    add_library(LibTorch::CUDA INTERFACE IMPORTED)
    target_link_libraries(LibTorch::CUDA INTERFACE ${LibTorch_torch_cuda_LIBRARY}
      ${LibTorch_c10_cuda_LIBRARY})
  endif()
  if(LibTorch_torch_python_LIBRARY)
    add_library(LibTorch::Python INTERFACE IMPORTED)
    target_link_libraries(LibTorch::Python INTERFACE LibTorch::LibTorch
      ${LibTorch_torch_python_LIBRARY})
  endif()
endif()
