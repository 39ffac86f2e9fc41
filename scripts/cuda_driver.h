// Added to llama.cpp's CUDA backend by build_llama.sh.
//
// The original links libcuda.so.1, which comes with the NVIDIA driver. Without the driver, the loader could not load
// the backend, and so neither libllama nor the binding for Python. These macros look up the functions of the driver
// through the CUDA run-time, when they are called. The run-time loads without the driver. It then reports no devices,
// and the CPU computes. The backend calls these functions only for a device.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cuda.h>
#include <cuda_runtime.h>

// Return the function of the driver called `name`. Ends the process if the driver lacks it.
inline void *erl_driver_function(const char *name) {
    void *function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaError_t status = cudaGetDriverEntryPointByVersion(name, &function, CUDART_VERSION, cudaEnableDefault, &found);
#else
    cudaError_t status = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
    if (status != cudaSuccess || found != cudaDriverEntryPointSuccess || function == nullptr) {
        fprintf(stderr, "the NVIDIA driver has no function %s\n", name);
        abort();
    }
    return function;
}

// The looked-up pointer is kept, as one static variable per function and source file.
#define ERL_DRIVER_CALL(function)                                                                                      \
    ([]() {                                                                                                            \
        static const auto pointer = reinterpret_cast<decltype(&function)>(erl_driver_function(#function));            \
        return pointer;                                                                                                \
    }())

#define cuDeviceGet ERL_DRIVER_CALL(cuDeviceGet)
#define cuDeviceGetAttribute ERL_DRIVER_CALL(cuDeviceGetAttribute)
#define cuGetErrorString ERL_DRIVER_CALL(cuGetErrorString)
#define cuMemAddressFree ERL_DRIVER_CALL(cuMemAddressFree)
#define cuMemAddressReserve ERL_DRIVER_CALL(cuMemAddressReserve)
#define cuMemCreate ERL_DRIVER_CALL(cuMemCreate)
#define cuMemGetAllocationGranularity ERL_DRIVER_CALL(cuMemGetAllocationGranularity)
#define cuMemMap ERL_DRIVER_CALL(cuMemMap)
#define cuMemRelease ERL_DRIVER_CALL(cuMemRelease)
#define cuMemSetAccess ERL_DRIVER_CALL(cuMemSetAccess)
#define cuMemUnmap ERL_DRIVER_CALL(cuMemUnmap)
