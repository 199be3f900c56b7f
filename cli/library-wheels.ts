/**
 * NVIDIA's wheels that hold what the GPU plugin loads at run time, for linux x64: pinned, so that
 * what was tested is what is installed. docs/cuda.md names the versions.
 */

export interface Wheel {
  /** The package, as an index names it. */
  name: string
  version: string
  /** The file, as an index lists it. */
  file: string
  sizeBytes: number
  sha256: string
  /** Paths in the wheel that are kept; each file's name stays, its folder does not. */
  keep: RegExp
  /** What the kept files have together. */
  keptBytes: number
}

const cublas: Wheel = {
  name: 'nvidia-cublas',
  version: '13.0.2.14',
  file: 'nvidia_cublas-13.0.2.14-py3-none-manylinux_2_27_x86_64.whl',
  sizeBytes: 420_882_912,
  sha256: '0cf238ffdbe46c00cb9aa98e7bca745c223a5ca5a53e686ac8b3e5a08fe80d6c',
  keep: /^nvidia\/cu13\/lib\/libcublasLt\.so\.13$/,
  keptBytes: 539_533_072,
}

/** libcudnn.so.9 opens its parts by name when it first needs them: all of them are kept. */
const cudnn: Wheel = {
  name: 'nvidia-cudnn-cu13',
  version: '9.19.0.56',
  file: 'nvidia_cudnn_cu13-9.19.0.56-py3-none-manylinux_2_27_x86_64.whl',
  sizeBytes: 366_066_321,
  sha256: 'd20e1734305e9d68889a96e3f35094d733ff1f83932ebe462753973e53a572bf',
  keep: /^nvidia\/cudnn\/lib\/libcudnn(_\w+)?\.so\.9$/,
  keptBytes: 493_410_224,
}

/** cuDNN compiles some of its kernels when they are first used. */
const nvrtc: Wheel = {
  name: 'nvidia-cuda-nvrtc',
  version: '13.0.88',
  file: 'nvidia_cuda_nvrtc-13.0.88-py3-none-manylinux2010_x86_64.manylinux_2_12_x86_64.whl',
  sizeBytes: 90_215_200,
  sha256: 'ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575',
  keep: /^nvidia\/cu13\/lib\/libnvrtc(-builtins)?\.so\.[\d.]+$/,
  keptBytes: 113_718_680,
}

export const libraryWheels: readonly Wheel[] = [cublas, cudnn, nvrtc]
