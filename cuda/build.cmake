# Finds an nvcc that works and compiles cuda/*.cu with it. Sets cuda_objects, cuda_libraries, WARPDECODE_CUDA_FOUND.
set(WARPDECODE_CUDA_FOUND OFF)
set(cuda_objects "")
set(cuda_libraries "")
if(NOT WARPDECODE_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "warpdecode: WARPDECODE_CUDA was '${WARPDECODE_CUDA}', expected auto, on or off")
endif()
if(WARPDECODE_CUDA STREQUAL "off")
  message(STATUS "warpdecode: CPU-only build (WARPDECODE_CUDA=off)")
  return()
endif()

# First CUDACXX, the user's word; then the build requirement from PyPI, whose version is known; then the PATH.
set(nvcc_reason "nvcc was not found: CUDACXX is not set, PyPI's cuda-toolkit[nvcc,cudart,cccl] is not installed, and there \
is no nvcc on the PATH")
set(python_nvcc "")
if(Python3_FOUND)
  execute_process(COMMAND ${Python3_EXECUTABLE} -c
    "import importlib.util as u; print(u.find_spec('nvidia.cu13').submodule_search_locations[0] + '/bin')"
    OUTPUT_VARIABLE python_nvcc OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(DEFINED ENV{CUDACXX} AND NOT WARPDECODE_NVCC)
  set(WARPDECODE_NVCC $ENV{CUDACXX} CACHE FILEPATH "nvcc")
endif()
find_program(WARPDECODE_NVCC nvcc HINTS ${python_nvcc} PATHS /usr/local/cuda/bin)

set(gencode "")
set(architecture_names "")
foreach(architecture IN LISTS WARPDECODE_CUDA_ARCHITECTURES)
  if(architecture MATCHES "^([0-9]+)-virtual$" AND CMAKE_MATCH_1 LESS 90)
    message(FATAL_ERROR "warpdecode: WARPDECODE_CUDA_ARCHITECTURES had ${architecture}, expected 90-virtual or newer: a \
driver would compile it for newer GPUs, where kernels begin before the one before them has ended, and it does not wait")
  elseif(architecture MATCHES "^([0-9]+a?)-virtual$")
    list(APPEND gencode -gencode=arch=compute_${CMAKE_MATCH_1},code=compute_${CMAKE_MATCH_1})
  else()
    list(APPEND gencode -gencode=arch=compute_${architecture},code=sm_${architecture})
  endif()
endforeach()
string(REPLACE ";" " " architecture_names "${WARPDECODE_CUDA_ARCHITECTURES}")
set(nvcc_flags -std=c++17 -O3 ${gencode} --compress-mode=size -Werror all-warnings
    -Xcompiler=-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics,-Wall,-Wextra,-Werror)

if(WARPDECODE_NVCC)
  # A probe, because a found nvcc may be too old for an architecture, or lack a host compiler that it accepts.
  file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/probe.cu "__global__ void probe() {}\n")
  execute_process(COMMAND ${WARPDECODE_NVCC} ${nvcc_flags} -c ${CMAKE_CURRENT_BINARY_DIR}/probe.cu
                          -o ${CMAKE_CURRENT_BINARY_DIR}/probe.o
                  RESULT_VARIABLE probe_result ERROR_VARIABLE probe_error OUTPUT_VARIABLE probe_error)
  get_filename_component(nvcc_real ${WARPDECODE_NVCC} REALPATH)
  get_filename_component(cuda_root ${nvcc_real} DIRECTORY)
  get_filename_component(cuda_root ${cuda_root} DIRECTORY)
  find_library(WARPDECODE_CUDART_STATIC libcudart_static.a NO_DEFAULT_PATH
               PATHS ${cuda_root}/lib64 ${cuda_root}/lib ${cuda_root}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib
                     /usr/local/cuda/lib64)
  if(NOT probe_result EQUAL 0)
    set(nvcc_reason "${WARPDECODE_NVCC} cannot compile for ${architecture_names}: ${probe_error}")
  elseif(NOT WARPDECODE_CUDART_STATIC)
    set(nvcc_reason "${WARPDECODE_NVCC} works, but libcudart_static.a was not found below ${cuda_root}")
  else()
    set(WARPDECODE_CUDA_FOUND ON)
  endif()
endif()

if(NOT WARPDECODE_CUDA_FOUND)
  if(WARPDECODE_CUDA STREQUAL "on")
    message(FATAL_ERROR "warpdecode: WARPDECODE_CUDA=on, but ${nvcc_reason}")
  endif()
  message(WARNING "warpdecode: CPU-ONLY BUILD. ${nvcc_reason}. CUDA tensors will be refused with a sentence that says so. "
                  "WARPDECODE_CUDA=on makes this an error, WARPDECODE_CUDA=off makes it silent.")
  return()
endif()
message(STATUS "warpdecode: CUDA kernels for ${architecture_names} by ${WARPDECODE_NVCC}")

# wgmma exists on compute capability 9.0 alone, and only when the target is written sm_90a.
set(tiled_flags ${nvcc_flags})
list(FILTER tiled_flags EXCLUDE REGEX "^-gencode")
list(APPEND tiled_flags -gencode=arch=compute_90a,code=sm_90a)
set(tiled_built "")
if("90" IN_LIST WARPDECODE_CUDA_ARCHITECTURES)
  set(tiled_built -DWD_CUDA_TILED_BUILT)
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cu)
foreach(source IN LISTS cuda_sources)
  get_filename_component(stem ${source} NAME_WE)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda_${stem}.o)
  set(flags ${nvcc_flags})
  if(stem MATCHES "_tiled(_f16)?$")
    set(flags ${tiled_flags})
  endif()
  add_custom_command(OUTPUT ${object}
    COMMAND ${WARPDECODE_NVCC} ${flags} ${tiled_built} -DWD_CUDA_ARCHITECTURES=\"${architecture_names}\" -I${DLPACK_INCLUDE_DIR}
            -MD -MF ${object}.d -c ${source} -o ${object}
    DEPENDS ${source} DEPFILE ${object}.d COMMENT "nvcc ${stem}.cu" VERBATIM)
  list(APPEND cuda_objects ${object})
endforeach()
set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
set(cuda_libraries ${WARPDECODE_CUDART_STATIC} Threads::Threads ${CMAKE_DL_LIBS} rt)
