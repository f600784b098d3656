# Warnings and sanitizers for the host compiler.
#
#   KDK_SANITIZE=ON  AddressSanitizer and UBSan, for the emulator's tests. Run them with
#                    ASAN_OPTIONS=detect_stack_use_after_return=0: a fiber has one stack, not two.
option(KDK_SANITIZE "AddressSanitizer and UndefinedBehaviorSanitizer" OFF)

function(kd_warnings target)
  # -fno-strict-aliasing because kernels reinterpret memory, which nvcc allows.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-fno-strict-aliasing>)
  if(KDK_SANITIZE)
    set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=all)
    target_compile_options(${target} PRIVATE
      "$<$<COMPILE_LANGUAGE:CXX>:${sanitizers};-fno-omit-frame-pointer>")
    target_link_options(${target} PRIVATE ${sanitizers})
  endif()
endfunction()
