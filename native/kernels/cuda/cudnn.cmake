# Attention by cuDNN: included by CMakeLists.txt, whose HOST_SOURCES it cuts to what is built.
#
# cuDNN's own headers and its frontend's come from pip's wheels (scripts/cuda-setup.mjs). Without
# them the plugin is built with attention_cudnn_absent.cc, and its own attention serves.
find_path(CUDNN_INCLUDE cudnn.h PATHS ${CUDA_INCLUDE_FOLDERS} ${PIP_INCLUDE_FOLDERS} NO_DEFAULT_PATH)
find_path(CUDNN_FRONTEND_INCLUDE cudnn_frontend.h PATHS ${CUDA_INCLUDE_FOLDERS} ${PIP_INCLUDE_FOLDERS} NO_DEFAULT_PATH)
list(FILTER HOST_SOURCES EXCLUDE REGEX "/(attention_cudnn|cudnn_graph|cudnn_library)\\.cc$")
if(CUDNN_INCLUDE AND CUDNN_FRONTEND_INCLUDE)
  list(FILTER HOST_SOURCES EXCLUDE REGEX "/attention_cudnn_absent\\.cc$")
  add_library(cuda_attention OBJECT attention_cudnn.cc cudnn_graph.cc cudnn_library.cc)
  target_include_directories(cuda_attention SYSTEM PRIVATE ${CUDART_INCLUDE} ${CUDNN_INCLUDE} ${CUDNN_FRONTEND_INCLUDE})
  # The only file with the frontend's headers; nvrtc.h of this folder stands in for NVRTC's.
  set_source_files_properties(cudnn_graph.cc PROPERTIES
    COMPILE_OPTIONS "-O1;-I${CMAKE_CURRENT_SOURCE_DIR}"
    COMPILE_DEFINITIONS "CUDNN_FRONTEND_SKIP_JSON_LIB;NV_CUDNN_FRONTEND_DISABLE_LOGGING")
  list(APPEND HOST_SOURCES $<TARGET_OBJECTS:cuda_attention>)

  add_executable(cuda_attention_test ${CMAKE_SOURCE_DIR}/../test/native/cuda_attention_test.cc
    attention_chunks.cc card_refusals.cc device_memory.cc library_search.cc
    $<TARGET_OBJECTS:cuda_attention> ${CMAKE_CURRENT_BINARY_DIR}/attention_layout.o)
  target_include_directories(cuda_attention_test SYSTEM PRIVATE ${CUDART_INCLUDE})
  target_link_libraries(cuda_attention_test PRIVATE ${CUDART_STATIC} Threads::Threads ${CMAKE_DL_LIBS} rt)
  add_dependencies(cuda_attention_test tunemesh_cuda)  # which makes attention_layout.o
else()
  message(STATUS "cuDNN's or its frontend's headers not found: the plugin is built without cuDNN")
endif()
