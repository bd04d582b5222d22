// Registers the CPU kernels with ONNX Runtime as operators of domain dsa.cpu.
#include "kernels.h"
#include "ort_api.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iterator>
#include <memory>
#include <sched.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace dsa::cpu
{

#define DSA_DECLARE(isa) namespace isa { extern Kernels const kernels; }
DSA_DECLARE(baseline)
#if defined(__x86_64__)
DSA_DECLARE(avx2)
DSA_DECLARE(avx512)
#endif

namespace
{

constexpr char const* kDomain = "dsa.cpu";
constexpr int64_t kKeysPerSlice = 1024, kRowsPerPart = 128, kRowsPerSmallTask = 4096, kHeadsPerBlock = 128;
constexpr int64_t kNumbersOfOneThread = 16384;

ort::Api const* api = nullptr;

/// Processors that this process may use: what the work is cut for. Results depend on it by rounding alone.
int64_t processors()
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

/// A failed call of the API, which is handed on as it is.
struct Failed
{
    OrtStatus* status;
};

void check(OrtStatus* status)
{
    if (status)
        throw Failed{status};
}

void require(bool condition, char const* message)
{
    if (!condition)
        throw std::invalid_argument(message);
}

/// The kernels of the processor's best instruction set, or of the one that DSA_CPU_KERNELS names.
Kernels const& chosen_kernels()
{
    struct Choice
    {
        char const* name;
        Kernels const* kernels;
        bool supported;
    };
    Choice const choices[] = {
#if defined(__x86_64__)
        {"avx512", &avx512::kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
                && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")},
        {"avx2", &avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
                && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")},
#endif
        {"baseline", &baseline::kernels, true},
    };
    char const* const wanted = std::getenv("DSA_CPU_KERNELS");
    for (Choice const& choice : choices)
        if (choice.supported && (!wanted || std::strcmp(wanted, choice.name) == 0))
            return *choice.kernels;
    throw std::invalid_argument("this processor has no instruction set that DSA_CPU_KERNELS names");
}

struct Tensor
{
    std::vector<int64_t> dims;
    int type;
    void* data;

    explicit Tensor(OrtValue const* value)
    {
        OrtTensorTypeAndShapeInfo* info = nullptr;
        check(api->GetTensorTypeAndShape(value, &info));
        size_t count = 0;
        OrtStatus* status = api->GetDimensionsCount(info, &count);
        dims.resize(count);
        if (!status)
            status = api->GetDimensions(info, dims.data(), count);
        if (!status)
            status = api->GetTensorElementType(info, &type);
        api->ReleaseTensorTypeAndShapeInfo(info);
        check(status);
        check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    }

    bool is(int of_type, std::vector<int64_t> const& shape) const
    {
        return type == of_type && dims == shape;
    }
};

Tensor input(OrtKernelContext* context, size_t index)
{
    OrtValue const* value = nullptr;
    check(api->KernelContext_GetInput(context, index, &value));
    require(value != nullptr, "an input is missing");
    return Tensor(value);
}

template <class T>
T* output(OrtKernelContext* context, size_t index, std::vector<int64_t> const& dims)
{
    OrtValue* value = nullptr;
    check(api->KernelContext_GetOutput(context, index, dims.data(), dims.size(), &value));
    void* data = nullptr;
    check(api->GetTensorMutableData(value, &data));
    return static_cast<T*>(data);
}

int64_t int_attribute(OrtKernelInfo const* info, char const* name, int64_t otherwise)
{
    int64_t value = 0;
    OrtStatus* status = api->KernelInfoGetAttribute_int64(info, name, &value);
    if (!status)
        return value;
    api->ReleaseStatus(status);
    return otherwise;
}

/// Runs work(call, i) for all i < total on the session's threads. A task that throws is reported once all are through.
template <class Call>
void parallel(OrtKernelContext* context, void (*work)(Call const&, int64_t), Call const& call, int64_t total)
{
    struct Shared
    {
        void (*work)(Call const&, int64_t);
        Call const* call;
        std::atomic<bool> failed{false};
    } shared{work, &call};
    auto one = [](void* data, size_t i)
    {
        auto* const shared = static_cast<Shared*>(data);
        try
        {
            shared->work(*shared->call, static_cast<int64_t>(i));
        }
        catch (...)
        {
            shared->failed = true;
        }
    };
    if (total == 1)
        one(&shared, 0);
    else if (total > 1)
        check(api->KernelContext_ParallelFor(context, one, static_cast<size_t>(total), 0, &shared));
    if (shared.failed)
        throw std::bad_alloc();
}

struct IndexTopKKernel
{
    static constexpr char const* kName = "IndexTopK";
    static constexpr int kInputs[] = {ort::kUndefined, ort::kFloat, ort::kUndefined, ort::kInt64, ort::kFloat};
    static constexpr size_t kRequiredInputs = 4;
    static constexpr int kOutputs[] = {ort::kInt32};

    int64_t k, sinks, window, pool;
    Kernels const& kernels = chosen_kernels();

    explicit IndexTopKKernel(OrtKernelInfo const* info)
        : k(int_attribute(info, "k", 0)), sinks(int_attribute(info, "sinks", 0)),
          window(int_attribute(info, "window", 0)), pool(int_attribute(info, "pool", 1))
    {
        // As check_options() of index_topk/op.py; finish() relies on it.
        require(k >= 1 && pool >= 1 && k % pool == 0 && sinks >= 0 && window >= 0 && sinks <= k && window <= k,
            "k, sinks, window or pool is wrong");
        int64_t const recent = window ? (window + pool - 2) / pool + 1 : pool > 1;
        require((sinks + pool - 1) / pool + recent <= k / pool, "sinks and window do not fit in k");
    }

    void compute(OrtKernelContext* context) const
    {
        Tensor const q = input(context, 0), weights = input(context, 1), keys = input(context, 2);
        Tensor const lengths = input(context, 3);
        require(q.dims.size() == 4 && keys.dims.size() == 3, "index_q must be [B, S, Hi, Di], index_k [B, G, Di]");
        IndexTopK call{};
        call.B = q.dims[0], call.S = q.dims[1], call.Hi = q.dims[2], call.Di = q.dims[3], call.G = keys.dims[1];
        call.k = k, call.sinks = sinks, call.window = window, call.pool = pool;
        size_t inputs = 0;
        check(api->KernelContext_GetInputCount(context, &inputs));
        bool const bytes = keys.type == ort::kUint8;
        require(bytes == (inputs > kRequiredInputs), "index_scale belongs to index_k in uint8");
        require(q.type == (bytes ? ort::kInt8 : ort::kFloat) && keys.is(bytes ? ort::kUint8 : ort::kFloat,
            {call.B, call.G, call.Di}), "index_q and index_k must be fp32, or int8 and uint8, of one B and Di");
        require(call.Hi > 0 && call.Di > 0, "Hi and Di must be positive");
        require(!bytes || call.Di % 4 == 0, "Di must be a multiple of 4 for keys in uint8");
        require(weights.is(ort::kFloat, {call.B, call.S, call.Hi}), "index_weights must be [B, S, Hi] in fp32");
        require(lengths.is(ort::kInt64, {call.B}), "kv_lengths must be [B] in int64");
        if (bytes)
        {
            Tensor const scale = input(context, 4);
            require(scale.is(ort::kFloat, {call.B, call.G}), "index_scale must be [B, G] in fp32");
            call.index_scale = static_cast<float const*>(scale.data);
        }
        call.index_q = q.data, call.index_k = keys.data;
        call.index_weights = static_cast<float const*>(weights.data);
        call.kv_lengths = static_cast<int64_t const*>(lengths.data);
        call.indices = output<int32_t>(context, 0, {call.B, call.S, k});
        if (call.B == 0 || call.S == 0)
            return;

        call.blocks = (call.S + kQueriesPerBlock - 1) / kQueriesPerBlock;
        int64_t const most = std::max<int64_t>(call.G / kKeysPerSlice, 1);
        call.slices = std::clamp<int64_t>(processors() / (call.B * call.blocks), 1, most);
        int64_t const queries = call.B * call.S;
        std::unique_ptr<uint64_t[]> candidates(new uint64_t[queries * call.slices * (k / pool)]);
        std::unique_ptr<int32_t[]> counts(new int32_t[queries * call.slices]);
        call.candidates = candidates.get(), call.counts = counts.get();
        parallel(context, kernels.select, call, call.B * call.blocks * call.slices);
        parallel(context, kernels.finish, call, queries);
    }
};

/// Over the rows that indices name, or over every visible one.
template <bool sparse>
struct AttentionKernel
{
    static constexpr char const* kName = sparse ? "SparseAttention" : "DenseAttention";
    static constexpr int kInputs[] = {ort::kFloat, ort::kUndefined, ort::kUndefined, sparse ? ort::kInt32 : ort::kInt64};
    static constexpr size_t kRequiredInputs = 4;
    static constexpr int kOutputs[] = {ort::kFloat};

    float scale = 0;
    Kernels const& kernels = chosen_kernels();

    explicit AttentionKernel(OrtKernelInfo const* info)
    {
        check(api->KernelInfoGetAttribute_float(info, "scale", &scale));
    }

    void compute(OrtKernelContext* context) const
    {
        Tensor const q = input(context, 0), k_cache = input(context, 1), v_cache = input(context, 2);
        Tensor const which = input(context, 3);
        require(q.dims.size() == 4 && k_cache.dims.size() == 4, "q must be [B, Hq, S, D], the caches [B, Hkv, C, D]");
        SparseAttention call{};
        call.scale = scale;
        call.B = q.dims[0], call.Hq = q.dims[1], call.S = q.dims[2], call.D = q.dims[3];
        call.Hkv = k_cache.dims[1], call.C = k_cache.dims[2];
        require(call.Hq > 0 && call.Hkv > 0 && call.D > 0, "Hq, Hkv and D must be positive");
        require(call.Hq % call.Hkv == 0, "query heads must be a multiple of KV heads");
        std::vector<int64_t> const cache{call.B, call.Hkv, call.C, call.D};
        require(k_cache.dims == cache && v_cache.dims == cache, "B, Hkv, C, D differ between the inputs");
        call.half = k_cache.type == ort::kFloat16;
        require((call.half || k_cache.type == ort::kFloat) && v_cache.type == k_cache.type,
            "the caches must both be fp32, or both fp16");
        if constexpr (sparse)
        {
            require(which.dims.size() == 3 && which.dims[0] == call.B && which.dims[1] == call.S,
                "indices must be [B, S, K]");
            static int32_t const none = -1; // of an empty tensor, whose data may be null
            call.K = which.dims[2];
            call.indices = which.data ? static_cast<int32_t const*>(which.data) : &none;
        }
        else
        {
            require(which.dims == std::vector<int64_t>{call.B}, "kv_lengths must be [B]");
            call.kv_lengths = static_cast<int64_t const*>(which.data);
        }
        call.q = static_cast<float const*>(q.data);
        call.k_cache = k_cache.data, call.v_cache = v_cache.data;
        call.output = output<float>(context, 0, q.dims);
        if (call.B == 0 || call.S == 0)
            return;

        int64_t const group = call.Hq / call.Hkv, rows = sparse ? call.K : call.C;
        int64_t const queries = sparse ? 1 : std::max<int64_t>(kHeadsPerBlock / group, 1);
        call.blocks = (call.S + queries - 1) / queries;
        int64_t const tasks = call.B * call.blocks * call.Hkv;
        // Several tasks for each processor, where they are long: one that is held up does fewer.
        int64_t const wanted = std::max(processors() / tasks, std::min(4 * processors() / tasks, rows / kRowsPerSmallTask));
        call.parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(rows / kRowsPerPart, 1));
        std::unique_ptr<float[]> partial;
        if (call.parts > 1)
            partial.reset(new float[call.B * call.S * call.Hkv * call.parts * group * (call.D + 2)]);
        call.partial = partial.get();
        parallel(context, kernels.attend, call, tasks * call.parts);
        if (call.parts > 1)
            parallel(context, kernels.merge_parts, call, call.B * call.S * call.Hkv);
    }
};

void round_rows(OrtKernelContext* context, Kernels const& kernels, Rounding const& call)
{
    if (call.rows * call.size < kNumbersOfOneThread)
        for (int64_t row = 0; row < call.rows; ++row)
            kernels.round_row(call, row);
    else
        parallel(context, kernels.round_row, call, call.rows);
}

/// The shape without its last dimension, of which `size` is the length.
std::vector<int64_t> rows_of(std::vector<int64_t> dims, int64_t& size, int64_t& rows)
{
    require(!dims.empty(), "what is rounded must have a dimension");
    size = dims.back();
    dims.pop_back();
    rows = 1;
    for (int64_t const dim : dims)
        rows *= dim;
    return dims;
}

struct RoundKeysKernel
{
    static constexpr char const* kName = "RoundKeys";
    static constexpr int kInputs[] = {ort::kFloat};
    static constexpr size_t kRequiredInputs = 1;
    static constexpr int kOutputs[] = {ort::kUint8, ort::kFloat};

    Kernels const& kernels = chosen_kernels();

    explicit RoundKeysKernel(OrtKernelInfo const*) {}

    void compute(OrtKernelContext* context) const
    {
        Tensor const keys = input(context, 0);
        Rounding call{};
        std::vector<int64_t> const rows = rows_of(keys.dims, call.size, call.rows);
        call.full = 127, call.zero = 128; // FULL_KEY and ZERO_KEY of index_topk/rounding.py
        call.numbers = static_cast<float const*>(keys.data);
        call.bytes = output<uint8_t>(context, 0, keys.dims);
        call.scales = output<float>(context, 1, rows);
        round_rows(context, kernels, call);
    }
};

struct RoundQueriesKernel
{
    static constexpr char const* kName = "RoundQueries";
    static constexpr int kInputs[] = {ort::kFloat, ort::kFloat};
    static constexpr size_t kRequiredInputs = 2;
    static constexpr int kOutputs[] = {ort::kInt8, ort::kFloat};

    Kernels const& kernels = chosen_kernels();

    explicit RoundQueriesKernel(OrtKernelInfo const*) {}

    void compute(OrtKernelContext* context) const
    {
        Tensor const queries = input(context, 0), weights = input(context, 1);
        Rounding call{};
        std::vector<int64_t> const rows = rows_of(queries.dims, call.size, call.rows);
        require(weights.dims == rows, "index_weights must be [B, S, Hi]");
        call.full = 63; // FULL_QUERY
        call.numbers = static_cast<float const*>(queries.data);
        call.weights = static_cast<float const*>(weights.data);
        call.bytes = output<uint8_t>(context, 0, queries.dims);
        call.scales = output<float>(context, 1, rows);
        round_rows(context, kernels, call);
    }
};

template <class Work>
OrtStatus* guarded(Work work)
{
    try
    {
        work();
        return nullptr;
    }
    catch (Failed const& failed)
    {
        return failed.status;
    }
    catch (std::invalid_argument const& error)
    {
        return api->CreateStatus(ort::kInvalidArgument, (std::string(kDomain) + ": " + error.what()).c_str());
    }
    catch (std::exception const& error)
    {
        return api->CreateStatus(ort::kFail, (std::string(kDomain) + ": " + error.what()).c_str());
    }
    catch (...)
    {
        return api->CreateStatus(ort::kFail, kDomain);
    }
}

template <class Kernel>
ort::CustomOp custom_op()
{
    using ort::CustomOp;
    CustomOp op;
    op.GetName = [](CustomOp const*) { return Kernel::kName; };
    op.GetExecutionProviderType = [](CustomOp const*) { return static_cast<char const*>(nullptr); };
    op.GetInputTypeCount = [](CustomOp const*) { return std::size(Kernel::kInputs); };
    op.GetInputType = [](CustomOp const*, size_t i) { return Kernel::kInputs[i]; };
    op.GetInputCharacteristic = [](CustomOp const*, size_t i)
    { return static_cast<int>(i < Kernel::kRequiredInputs ? ort::kRequired : ort::kOptional); };
    op.GetInputMemoryType = [](CustomOp const*, size_t) { return 0; };
    op.GetOutputTypeCount = [](CustomOp const*) { return std::size(Kernel::kOutputs); };
    op.GetOutputType = [](CustomOp const*, size_t i) { return Kernel::kOutputs[i]; };
    op.GetOutputCharacteristic = [](CustomOp const*, size_t) { return static_cast<int>(ort::kRequired); };
    op.GetStartVersion = [](CustomOp const*) { return 1; };
    op.GetEndVersion = [](CustomOp const*) { return 1; };
    op.CreateKernelV2 = [](CustomOp const*, ort::Api const*, OrtKernelInfo const* info, void** kernel)
    { return guarded([&] { *kernel = new Kernel(info); }); };
    op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context)
    { return guarded([&] { static_cast<Kernel*>(kernel)->compute(context); }); };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

} // namespace
} // namespace dsa::cpu

/// What ONNX Runtime calls when a session is given this library.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, ort::ApiBase const* base)
{
    using namespace dsa::cpu;
    if (!base->GetApi(ort::kApiVersion))
        return base->GetApi(1)->CreateStatus(ort::kFail, "dsa.cpu needs ONNX Runtime 1.17 or newer");
    static ort::CustomOp const operators[] = {custom_op<IndexTopKKernel>(), custom_op<AttentionKernel<true>>(),
        custom_op<AttentionKernel<false>>(), custom_op<RoundKeysKernel>(), custom_op<RoundQueriesKernel>()};
    return guarded([&]
    {
        // Sessions share the domain; it lives as long as the process.
        static OrtCustomOpDomain* const domain = [base]
        {
            api = base->GetApi(ort::kApiVersion);
            OrtCustomOpDomain* made = nullptr;
            check(api->CreateCustomOpDomain(kDomain, &made));
            for (ort::CustomOp const& op : operators)
                check(api->CustomOpDomain_Add(made, &op));
            return made;
        }();
        check(api->AddCustomOpDomain(options, domain));
    });
}
