# Attention by cuDNN: included by CMakeLists.txt, whose HOST_SOURCES it cuts to what is built.
#
# cuDNN's own headers and its frontend's come from pip's wheels (scripts/cuda-setup.mjs). Without
# them the plugin is built with attention_cudnn_absent.cc, and its own attention serves.
find_path(CUDNN_INCLUDE cudnn.h PATHS ${CUDA_INCLUDE_FOLDERS} ${PIP_INCLUDE_FOLDERS} NO_DEFAULT_PATH)
find_path(CUDNN_FRONTEND_INCLUDE cudnn_frontend.h PATHS ${CUDA_INCLUDE_FOLDERS} ${PIP_INCLUDE_FOLDERS} NO_DEFAULT_PATH)
if(CUDNN_INCLUDE AND CUDNN_FRONTEND_INCLUDE)
  set(CUDNN_SOURCES attention_cudnn.cc cudnn_graph.cc cudnn_library.cc)
  list(FILTER HOST_SOURCES EXCLUDE REGEX "/attention_cudnn_absent\\.cc$")
  set_source_files_properties(${CUDNN_SOURCES} PROPERTIES COMPILE_OPTIONS "-isystem;${CUDNN_INCLUDE}")
  # The only file with the frontend's headers; nvrtc.h of this folder stands in for NVRTC's.
  set_source_files_properties(cudnn_graph.cc PROPERTIES
    COMPILE_OPTIONS "-O1;-isystem;${CUDNN_FRONTEND_INCLUDE};-isystem;${CUDNN_INCLUDE};-I${CMAKE_CURRENT_SOURCE_DIR}"
    COMPILE_DEFINITIONS "CUDNN_FRONTEND_SKIP_JSON_LIB;NV_CUDNN_FRONTEND_DISABLE_LOGGING")
else()
  message(STATUS "cuDNN's or its frontend's headers not found: the plugin is built without cuDNN")
  list(FILTER HOST_SOURCES EXCLUDE REGEX "/(attention_cudnn|cudnn_graph|cudnn_library)\\.cc$")
endif()
