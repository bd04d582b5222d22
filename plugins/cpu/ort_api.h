// The part of ONNX Runtime's C API that custom operators need (onnxruntime_c_api.h, which no pip package brings).
// Functions keep their place in OrtApi for good, new ones come behind: since version 17 all of these are there.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

namespace ort
{

constexpr uint32_t kApiVersion = 17;
constexpr int kFail = 1, kInvalidArgument = 2; // OrtErrorCode
enum ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kFloat16 = 10 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

struct CustomOp;

/// OrtApi: a table of function pointers, of which only these are named.
struct Api
{
    void* functions[275];

    template <int place, class Result, class... Arguments>
    Result call(Arguments... arguments) const
    {
        return reinterpret_cast<Result (*)(Arguments...)>(functions[place])(arguments...);
    }

    OrtStatus* CreateStatus(int code, char const* message) const
    {
        return call<0, OrtStatus*, int, char const*>(code, message);
    }
    OrtStatus* CreateCustomOpDomain(char const* name, OrtCustomOpDomain** out) const
    {
        return call<26, OrtStatus*>(name, out);
    }
    OrtStatus* CustomOpDomain_Add(OrtCustomOpDomain* domain, CustomOp const* op) const
    {
        return call<27, OrtStatus*>(domain, op);
    }
    OrtStatus* AddCustomOpDomain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const
    {
        return call<28, OrtStatus*>(options, domain);
    }
    OrtStatus* GetTensorMutableData(OrtValue* value, void** out) const
    {
        return call<51, OrtStatus*>(value, out);
    }
    OrtStatus* GetTensorElementType(OrtTensorTypeAndShapeInfo const* info, int* out) const
    {
        return call<60, OrtStatus*>(info, out);
    }
    OrtStatus* GetDimensionsCount(OrtTensorTypeAndShapeInfo const* info, size_t* out) const
    {
        return call<61, OrtStatus*>(info, out);
    }
    OrtStatus* GetDimensions(OrtTensorTypeAndShapeInfo const* info, int64_t* out, size_t count) const
    {
        return call<62, OrtStatus*>(info, out, count);
    }
    OrtStatus* GetTensorTypeAndShape(OrtValue const* value, OrtTensorTypeAndShapeInfo** out) const
    {
        return call<65, OrtStatus*>(value, out);
    }
    OrtStatus* KernelInfoGetAttribute_float(OrtKernelInfo const* info, char const* name, float* out) const
    {
        return call<85, OrtStatus*>(info, name, out);
    }
    OrtStatus* KernelInfoGetAttribute_int64(OrtKernelInfo const* info, char const* name, int64_t* out) const
    {
        return call<86, OrtStatus*>(info, name, out);
    }
    OrtStatus* KernelContext_GetInputCount(OrtKernelContext const* context, size_t* out) const
    {
        return call<88, OrtStatus*>(context, out);
    }
    OrtStatus* KernelContext_GetInput(OrtKernelContext const* context, size_t index, OrtValue const** out) const
    {
        return call<90, OrtStatus*>(context, index, out);
    }
    OrtStatus* KernelContext_GetOutput(
        OrtKernelContext* context, size_t index, int64_t const* dims, size_t count, OrtValue** out) const
    {
        return call<91, OrtStatus*>(context, index, dims, count, out);
    }
    void ReleaseStatus(OrtStatus* status) const
    {
        call<93, void>(status);
    }
    void ReleaseTensorTypeAndShapeInfo(OrtTensorTypeAndShapeInfo* info) const
    {
        call<99, void>(info);
    }
    /// Runs work(data, i) for all i < total on the session's threads.
    OrtStatus* KernelContext_ParallelFor(
        OrtKernelContext const* context, void (*work)(void*, size_t), size_t total, size_t batches, void* data) const
    {
        return call<274, OrtStatus*>(context, work, total, batches, data);
    }
};

struct ApiBase
{
    Api const* (*GetApi)(uint32_t version);
    char const* (*GetVersionString)();
};

/// OrtCustomOp of version 17.
struct CustomOp
{
    uint32_t version = kApiVersion;
    void* (*CreateKernel)(CustomOp const*, Api const*, OrtKernelInfo const*) = nullptr;
    char const* (*GetName)(CustomOp const*) = nullptr;
    char const* (*GetExecutionProviderType)(CustomOp const*) = nullptr;
    int (*GetInputType)(CustomOp const*, size_t) = nullptr;
    size_t (*GetInputTypeCount)(CustomOp const*) = nullptr;
    int (*GetOutputType)(CustomOp const*, size_t) = nullptr;
    size_t (*GetOutputTypeCount)(CustomOp const*) = nullptr;
    void (*KernelCompute)(void*, OrtKernelContext*) = nullptr;
    void (*KernelDestroy)(void*) = nullptr;
    int (*GetInputCharacteristic)(CustomOp const*, size_t) = nullptr;
    int (*GetOutputCharacteristic)(CustomOp const*, size_t) = nullptr;
    int (*GetInputMemoryType)(CustomOp const*, size_t) = nullptr;
    int (*GetVariadicInputMinArity)(CustomOp const*) = nullptr;
    int (*GetVariadicInputHomogeneity)(CustomOp const*) = nullptr;
    int (*GetVariadicOutputMinArity)(CustomOp const*) = nullptr;
    int (*GetVariadicOutputHomogeneity)(CustomOp const*) = nullptr;
    OrtStatus* (*CreateKernelV2)(CustomOp const*, Api const*, OrtKernelInfo const*, void**) = nullptr;
    OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*) = nullptr;
    OrtStatus* (*InferOutputShapeFn)(CustomOp const*, OrtShapeInferContext*) = nullptr;
    int (*GetStartVersion)(CustomOp const*) = nullptr;
    int (*GetEndVersion)(CustomOp const*) = nullptr;
    size_t (*GetMayInplace)(int**, int**) = nullptr;
    void (*ReleaseMayInplace)(int*, int*) = nullptr;
    size_t (*GetAliasMap)(int**, int**) = nullptr;
    void (*ReleaseAliasMap)(int*, int*) = nullptr;
};

} // namespace ort
