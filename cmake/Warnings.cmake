# Warnings and sanitizers for the host compiler.
#
#   KDK_SANITIZE=ON  AddressSanitizer and UBSan, for the emulator's tests. Run them with
#                    ASAN_OPTIONS=detect_stack_use_after_return=0: a fiber has one stack, not two.
option(KDK_SANITIZE "Build with AddressSanitizer and UBSan" OFF)

# Strict warnings. -fno-strict-aliasing because kernels reinterpret memory, which nvcc allows.
function(kd_set_warnings target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-fno-strict-aliasing>)
  if(KDK_SANITIZE)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:
      -fsanitize=address,undefined;-fno-sanitize-recover=all;-fno-omit-frame-pointer;-g>)
    target_link_options(${target} PRIVATE -fsanitize=address,undefined)
  endif()
endfunction()

# Compiles the .cu files of `target` with the host compiler against the emulator in common/simt.h.
function(kd_emulate_cuda target)
  get_target_property(sources ${target} SOURCES)
  foreach(source IN LISTS sources)
    if(source MATCHES "\\.cu$")
      set_source_files_properties(${source} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
    endif()
  endforeach()
  kd_set_warnings(${target})
endfunction()
