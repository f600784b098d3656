# kd_add_isa_sources(target file...): compiles each file once per CPU ISA into `target`.
#
# CMake takes a source only once per target, so every (file, ISA) pair gets a one-line wrapper in the
# build folder that includes it. The wrapper is compiled with -DKDK_ISA=<isa> and the flags of that
# ISA; csrc/common/simd.h turns KDK_ISA into a namespace, csrc/common/isa.h picks at run time.

set(KD_ISA_FLAGS_avx512
    -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512)
set(KD_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(KD_ISA_FLAGS_baseline)

# Contraction is off because hot loops say fma() where they mean it: the bits then do not depend on
# the compiler's taste. Not -ffast-math: infinities and NaN are data here.
set(KD_ISA_FLAGS_COMMON -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=off)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(KD_ISAS baseline avx2 avx512)
else()
  set(KD_ISAS baseline)
endif()

function(kd_add_isa_sources target)
  foreach(source IN LISTS ARGN)
    get_filename_component(path "${source}" ABSOLUTE)
    get_filename_component(name "${source}" NAME_WE)
    foreach(isa IN LISTS KD_ISAS)
      set(wrapper "${CMAKE_CURRENT_BINARY_DIR}/isa/${target}/${name}_${isa}.cpp")
      set(KD_ISA_SOURCE "${path}")
      file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"@KD_ISA_SOURCE@\"\n" @ONLY)
      set_source_files_properties("${wrapper}" TARGET_DIRECTORY ${target} PROPERTIES
        COMPILE_OPTIONS "${KD_ISA_FLAGS_COMMON};${KD_ISA_FLAGS_${isa}}"
        COMPILE_DEFINITIONS "KDK_ISA=${isa}"
        SKIP_PRECOMPILE_HEADERS ON
        SKIP_UNITY_BUILD_INCLUSION ON)
      target_sources(${target} PRIVATE "${wrapper}")
    endforeach()
  endforeach()
endfunction()
