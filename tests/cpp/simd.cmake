# Self tests of the SIMD layer and of parallel_for; included by tests/cpp/CMakeLists.txt.
include(${CMAKE_CURRENT_LIST_DIR}/../../cmake/Isa.cmake)
find_package(Threads REQUIRED)

set(KD_COMMON ${CMAKE_CURRENT_LIST_DIR}/../../csrc/common)

add_executable(test_simd ${CMAKE_CURRENT_LIST_DIR}/test_simd_main.cpp ${KD_COMMON}/isa.cpp)
kd_add_isa_sources(test_simd ${CMAKE_CURRENT_LIST_DIR}/test_simd.cpp)

add_executable(test_parallel ${CMAKE_CURRENT_LIST_DIR}/test_parallel.cpp
                             ${KD_COMMON}/parallel.cpp)
target_link_libraries(test_parallel PRIVATE Threads::Threads ${CMAKE_DL_LIBS})

foreach(test IN ITEMS test_simd test_parallel)
  target_compile_features(${test} PRIVATE cxx_std_17)
  target_include_directories(${test} PRIVATE ${KD_COMMON}/.. ${CMAKE_CURRENT_LIST_DIR})
  add_test(NAME ${test} COMMAND ${test})
endforeach()
