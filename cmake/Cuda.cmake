# nvcc: architectures, flags, register report.
#
# SASS for the GPUs in use and PTX of the newest, so that a later GPU compiles it at load. Files named
# *_sm90.cu use Hopper-only instructions and are compiled for 90a alone.
set(KDK_CUDA_ARCHS "75;80;86;89;90;100;120" CACHE STRING "Compute capabilities, e.g. 80;90a")
set(KDK_CUDA_ARCHITECTURES "${KDK_CUDA_ARCHS}")

# KDK_CUDA_ARCHS overrides what CMake would guess from a GPU in this machine.
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

set(kd_gencode "")
foreach(arch IN LISTS KDK_CUDA_ARCHS)
  list(APPEND kd_gencode "-gencode=arch=compute_${arch},code=sm_${arch}")
endforeach()
list(GET KDK_CUDA_ARCHS -1 kd_newest)
if(NOT kd_newest MATCHES "a$")
  list(APPEND kd_gencode "-gencode=arch=compute_${kd_newest},code=compute_${kd_newest}")
endif()

function(kd_add_cuda_sources target)
  foreach(source IN LISTS ARGN)
    target_sources(${target} PRIVATE ${source})
    if(source MATCHES "_sm90\\.cu$")
      set(flags "-gencode=arch=compute_90a,code=sm_90a")
    else()
      set(flags "${kd_gencode}")
    endif()
    # -Xptxas -v prints what `make ptxas` reads; compression keeps seven architectures small.
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS
      "${flags};-Xptxas=-v;-Xfatbin=-compress-all;--threads=2;-Xcompiler=-fvisibility=hidden;--expt-relaxed-constexpr")
  endforeach()
  # The target was made before the language was there, so it has no default for this.
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES OFF CUDA_STANDARD 17
                        CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static)
  target_compile_definitions(${target} PUBLIC KDK_WITH_CUDA)
endfunction()

target_sources(kdkernels_core PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/common/cuda_info.cpp)
find_package(CUDAToolkit REQUIRED)
target_link_libraries(kdkernels_core PUBLIC CUDA::cudart_static)
