# Target stable_torch: the headers and libraries of the torch in the active Python, restricted to its stable ABI.
# find_package(Torch) is not used: on a CUDA build of torch it demands a CUDA toolkit, which nothing here needs.
find_package(Python3 REQUIRED COMPONENTS Interpreter)
execute_process(COMMAND ${Python3_EXECUTABLE} -c "import torch, os; print(torch.__version__); print(os.path.dirname(torch.__file__))"
                RESULT_VARIABLE torch_missing OUTPUT_VARIABLE torch_info ERROR_VARIABLE torch_error OUTPUT_STRIP_TRAILING_WHITESPACE)
if(torch_missing)
  message(FATAL_ERROR "magi_attention builds against torch >= 2.11, but ${Python3_EXECUTABLE} cannot import torch:\n${torch_error}")
endif()
string(REPLACE "\n" ";" torch_info "${torch_info}")
list(GET torch_info 0 torch_version)
list(GET torch_info 1 torch_dir)
if(torch_version VERSION_LESS 2.11)
  message(FATAL_ERROR "magi_attention builds against torch >= 2.11, found ${torch_version} in ${torch_dir}")
endif()
message(STATUS "torch ${torch_version} in ${torch_dir}")

add_library(stable_torch INTERFACE)
target_include_directories(stable_torch INTERFACE ${MAGI_ROOT}/csrc)
target_include_directories(stable_torch SYSTEM INTERFACE ${torch_dir}/include)
# 2.11 is the oldest release with everything used here (Tensor lists, parallel_for, devices) and the oldest that the distributed
# layer is tested on; a library built for it loads in every later torch.
target_compile_definitions(stable_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000ULL)
# No RPATH: torch is loaded before these libraries, wherever it lives.
target_link_libraries(stable_torch INTERFACE -Wl,--no-as-needed ${torch_dir}/lib/libtorch.so ${torch_dir}/lib/libtorch_cpu.so -Wl,--as-needed)
set(CMAKE_SKIP_RPATH ON)
