# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#
# The int4 MoE ops (csrc/hybrid_w4a16), as part of _rocm_C or of the CPU's _C. They are
# objects of their own because their GPU architectures and their CPU flags differ from
# those of the extension they are linked into. Stable ABI; they register themselves.
set(moe_int4_dir "${CMAKE_CURRENT_LIST_DIR}/../csrc/hybrid_w4a16")

if(VLLM_GPU_LANG STREQUAL "HIP")
  set(Python3_EXECUTABLE "${Python_EXECUTABLE}")
  set(TORCH_DIR "${TORCH_INSTALL_PREFIX}")
  set(HYBRID_W4A16_ROCM_HOMES "${ROCM_PATH}")
  include("${moe_int4_dir}/rocm/amd_device_code.cmake")
  hybrid_w4a16_all_archs(moe_int4_arches)
  set(moe_int4_others ${moe_int4_arches})
  list(REMOVE_ITEM moe_int4_others ${VLLM_GPU_ARCHES})
  list(REMOVE_ITEM moe_int4_arches ${moe_int4_others})
  if(NOT moe_int4_arches)
    message(STATUS "int4 MoE ops: none for ${VLLM_GPU_ARCHES}")
    return()
  endif()
  message(STATUS "int4 MoE ops: ${moe_int4_arches}")
  set(moe_int4_extensions _rocm_C)
  file(GLOB moe_int4_sources CONFIGURE_DEPENDS "${moe_int4_dir}/rocm/*.cpp")
else()
  set(moe_int4_extensions _C _C_AVX512 _C_AVX2)
endif()

add_library(_hybrid_w4a16_C OBJECT "${moe_int4_dir}/torch_bindings.cpp" ${moe_int4_sources})
set_target_properties(_hybrid_w4a16_C PROPERTIES
  POSITION_INDEPENDENT_CODE ON
  CXX_VISIBILITY_PRESET hidden)
target_compile_options(_hybrid_w4a16_C PRIVATE -O3)
target_compile_definitions(_hybrid_w4a16_C PRIVATE TORCH_TARGET_VERSION=0x020B000000000000ULL)
target_include_directories(_hybrid_w4a16_C PRIVATE "${moe_int4_dir}")
target_link_libraries(_hybrid_w4a16_C PRIVATE torch)

if(VLLM_GPU_LANG STREQUAL "HIP")
  hybrid_w4a16_add_device_code("${moe_int4_arches}")
  set(moe_int4_device_code hybrid_w4a16_device_code)
  target_compile_definitions(_hybrid_w4a16_C PRIVATE HYBRID_W4A16_HIP)
else()
  add_subdirectory("${moe_int4_dir}/cpu" hybrid_w4a16_cpu)
endif()

foreach(moe_int4_extension ${moe_int4_extensions})
  if(TARGET ${moe_int4_extension})
    target_link_libraries(${moe_int4_extension} PRIVATE _hybrid_w4a16_C ${moe_int4_device_code})
  endif()
endforeach()
