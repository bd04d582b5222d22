// TensorRT's headers include <cuda_runtime_api.h> for two opaque handles. Declaring them here spares the build the CUDA
// toolkit; the library itself calls the driver, see driver.h.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
