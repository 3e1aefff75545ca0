# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#
# Compiles the kernels for AMD GPUs and embeds them in a library. Needs no ROCm: any clang that has
# the AMDGPU target and lld will do.
#
# Variables, all optional:
#   HYBRID_W4A16_CLANG       this clang++ and no other
#   HYBRID_W4A16_ROCM_HOMES  folders of ROCm installations, searched before PATH
include_guard()
find_package(Python3 REQUIRED COMPONENTS Interpreter)

set(hybrid_w4a16_rocm_dir "${CMAKE_CURRENT_LIST_DIR}")
set(hybrid_w4a16_device_flags
    -x hip -std=c++17 -O3 --offload-device-only --no-gpu-bundle-output -nogpulib -nogpuinc
    -fuse-cuid=none         # no hash of a path in the code
    -mcode-object-version=5 # ROCm 6, 7 and 10 load it
)

# The architectures of amd_archs.json.
function(hybrid_w4a16_all_archs result)
  file(READ "${hybrid_w4a16_rocm_dir}/amd_archs.json" table)
  string(JSON count LENGTH "${table}")
  math(EXPR last "${count} - 1")
  foreach(i RANGE ${last})
    string(JSON arch MEMBER "${table}" ${i})
    list(APPEND archs ${arch})
  endforeach()
  set(${result} ${archs} PARENT_SCOPE)
endfunction()

# Compilers to try, in order: ROCm's, AMD's pip package beside torch, what PATH has.
function(hybrid_w4a16_clang_candidates result)
  if(HYBRID_W4A16_CLANG)
    set(${result} "${HYBRID_W4A16_CLANG}" PARENT_SCOPE)
    return()
  endif()
  cmake_path(GET TORCH_DIR PARENT_PATH packages)
  set(homes "$ENV{ROCM_PATH}" "$ENV{HIP_PATH}" "${HYBRID_W4A16_ROCM_HOMES}"
            "${packages}/_rocm_sdk_core" "${Python3_SITELIB}/_rocm_sdk_core")
  list(REMOVE_ITEM homes "")
  foreach(home ${homes})
    file(GLOB found "${home}/llvm/bin/clang++" "${home}/lib/llvm/bin/clang++")
    list(APPEND candidates ${found})
  endforeach()
  string(REPLACE ":" ";" path "$ENV{PATH}")
  foreach(folder ${path})
    file(GLOB numbered "${folder}/clang++-[0-9]*")
    list(SORT numbered COMPARE NATURAL ORDER DESCENDING)
    foreach(name amdclang++ clang++)
      if(EXISTS "${folder}/${name}")
        list(APPEND candidates "${folder}/${name}")
      endif()
    endforeach()
    list(APPEND candidates ${numbered})
  endforeach()
  list(REMOVE_DUPLICATES candidates)
  set(${result} ${candidates} PARENT_SCOPE)
endfunction()

# The first candidate that compiles and links a kernel for every one of the architectures; its
# version is not looked at. Fails with what was tried and what to install.
function(hybrid_w4a16_find_clang result archs)
  set(probe "${CMAKE_CURRENT_BINARY_DIR}/hybrid_w4a16_probe")
  file(WRITE "${probe}.hip" [[
using Pair = __bf16 __attribute__((ext_vector_type(2)));
extern "C" __attribute__((global)) void probe(float* out, Pair a, Pair b) {
  out[__builtin_amdgcn_workitem_id_x()] = __builtin_amdgcn_fdot2_f32_bf16(a, b, out[0], false);
}
]])
  hybrid_w4a16_clang_candidates(candidates)
  foreach(clang ${candidates})
    set(reason "")
    foreach(arch ${archs})
      execute_process(
        COMMAND "${clang}" ${hybrid_w4a16_device_flags} --offload-arch=${arch} "${probe}.hip"
                -o "${probe}.co"
        RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
      if(NOT status EQUAL 0)
        string(REGEX MATCH "[^\n]*error[^\n]*" line "${output}")
        set(reason "${arch}: ${line}")
        if(NOT line)
          set(reason "${arch}: ${status} ${output}")
        endif()
        break()
      endif()
    endforeach()
    if(NOT reason)
      set(${result} "${clang}" PARENT_SCOPE)
      return()
    endif()
    string(APPEND tried "\n  ${clang}\n    ${reason}")
  endforeach()
  if(NOT tried)
    set(tried "\n  nothing: there is no clang++ in ROCm's folders or on PATH")
  endif()
  list(JOIN archs " " archs)
  message(FATAL_ERROR
    "No clang here compiles GPU kernels for ${archs}. Tried:${tried}\n"
    "Install one of: ROCm's compiler (rocm-llvm, or pip's rocm-sdk-core from AMD's index); Debian's "
    "or Ubuntu's clang and lld of one version, such as clang-22 lld-22. Another place: "
    "-DHYBRID_W4A16_CLANG=/path/to/clang++ or ROCM_PATH=/path/to/rocm."
    # fork: begin overlay
    " Without GPU kernels: HYBRID_W4A16_GPU=none."
    # fork: end
  )
endfunction()

# Adds hybrid_w4a16_device_code, an object library that embeds every *.hip here, a code object per
# file and architecture.
function(hybrid_w4a16_add_device_code archs)
  # Searched again when the architectures or the settings have changed.
  set(wanted "${archs};${HYBRID_W4A16_CLANG};${HYBRID_W4A16_ROCM_HOMES}")
  if(NOT "${HYBRID_W4A16_FOUND_FOR}" STREQUAL "${wanted}" OR NOT EXISTS "${HYBRID_W4A16_FOUND_CLANG}")
    hybrid_w4a16_find_clang(clang "${archs}")
    set(HYBRID_W4A16_FOUND_CLANG "${clang}" CACHE INTERNAL "")
    set(HYBRID_W4A16_FOUND_FOR "${wanted}" CACHE INTERNAL "")
  endif()
  set(clang "${HYBRID_W4A16_FOUND_CLANG}")
  list(JOIN archs " " text)
  message(STATUS "hybrid_w4a16: AMD kernels for ${text} by ${clang}")

  file(GLOB kernels CONFIGURE_DEPENDS "${hybrid_w4a16_rocm_dir}/*.hip")
  # fork: begin overlay
  list(FILTER kernels EXCLUDE REGEX "_grouped_") # they need matrix instructions
  # fork: end
  file(GLOB headers CONFIGURE_DEPENDS "${hybrid_w4a16_rocm_dir}/*.h" "${hybrid_w4a16_rocm_dir}/*.cuh"
       "${hybrid_w4a16_rocm_dir}/../*.h")
  set(folder "${CMAKE_CURRENT_BINARY_DIR}/device_code")
  file(MAKE_DIRECTORY "${folder}")
  foreach(arch ${archs})
    foreach(kernel ${kernels})
      cmake_path(GET kernel STEM name)
      set(object "${folder}/${name}.${arch}.co")
      add_custom_command(
        OUTPUT "${object}"
        COMMAND "${clang}" ${hybrid_w4a16_device_flags} --offload-arch=${arch}
                "-I${hybrid_w4a16_rocm_dir}" "-I${hybrid_w4a16_rocm_dir}/.." "${kernel}"
                -o "${object}"
        DEPENDS "${kernel}" ${headers} "${clang}"
        COMMENT "${name} for ${arch}"
        VERBATIM)
      list(APPEND objects "${object}")
      list(APPEND entries "${arch}=${object}")
    endforeach()
  endforeach()
  set(source "${folder}/device_code.cpp")
  add_custom_command(
    OUTPUT "${source}"
    COMMAND Python3::Interpreter "${hybrid_w4a16_rocm_dir}/embed_device_code.py" "${source}"
            ${entries}
    DEPENDS ${objects} "${hybrid_w4a16_rocm_dir}/embed_device_code.py"
    COMMENT "Embedding code objects"
    VERBATIM)
  add_library(hybrid_w4a16_device_code OBJECT "${source}")
  set_target_properties(hybrid_w4a16_device_code PROPERTIES POSITION_INDEPENDENT_CODE ON)
  target_include_directories(hybrid_w4a16_device_code PRIVATE "${hybrid_w4a16_rocm_dir}")
endfunction()
