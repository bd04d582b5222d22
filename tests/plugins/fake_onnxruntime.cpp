// An ONNX Runtime that does nothing but call the CPU kernels, on random shapes. Built with sanitizers, it shows what reads or
// writes where it must not: each tensor ends where its memory ends, what nobody may look at is NaN, and every task has a thread
// of its own, whose scratch memory is no larger than the task asks for. What the results are is test_cpu.py's matter.
//
//   fake_onnxruntime CALLS           linked with the library's objects; DSA_CPU_KERNELS names the kernels
#include "ort_api.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

struct OrtStatus
{
    std::string message;
};

struct OrtValue
{
    int type;
    std::vector<int64_t> dims;
    int64_t size = 1;
    std::unique_ptr<char[]> memory; // none of an empty tensor

    OrtValue(int of_type, std::vector<int64_t> const& of_dims) : type(of_type), dims(of_dims)
    {
        for (int64_t const dim : dims)
            size *= dim;
        int64_t const bytes = size * (type == ort::kInt64 ? 8 : type == ort::kFloat16 ? 2 : type == ort::kUint8 || type == ort::kInt8 ? 1 : 4);
        memory.reset(bytes ? new char[bytes] : nullptr);
        std::fill_n(memory.get(), bytes, '\xFF'); // NaN of every floating-point type
    }

    template <class T>
    T* as()
    {
        return reinterpret_cast<T*>(memory.get());
    }
};

struct OrtTensorTypeAndShapeInfo
{
    OrtValue const* value;
};

struct OrtKernelInfo
{
    std::map<std::string, int64_t> integers;
    float scale;
};

struct OrtKernelContext
{
    std::vector<OrtValue*> inputs;
    std::vector<std::unique_ptr<OrtValue>> outputs;
};

struct OrtCustomOpDomain
{
    std::map<std::string, ort::CustomOp const*> operators;
};

struct OrtSessionOptions
{
    OrtCustomOpDomain* domain = nullptr;
};

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, ort::ApiBase const* base);

namespace
{

using Dims = std::vector<int64_t>;

std::mt19937_64 gBits;
int gProcessors = 1;
ort::CustomOp const* gRunning = nullptr;
std::string gCall; // what is running, for the message

int64_t draw(int64_t least, int64_t most)
{
    return std::uniform_int_distribution<int64_t>(least, most)(gBits);
}

int64_t one_of(Dims const& choices)
{
    return choices[draw(0, choices.size() - 1)];
}

void expect(bool holds, std::string const& what)
{
    if (holds)
        return;
    std::fprintf(stderr, "%s: %s\n", gCall.c_str(), what.c_str());
    std::exit(1);
}

ort::Api const& api()
{
    static ort::Api const table = []
    {
        ort::Api made{};
        auto set = [&](int place, auto* function) { made.functions[place] = reinterpret_cast<void*>(function); };
        auto done = [&]<class... Arguments>(int place, OrtStatus* (*function)(Arguments...)) { set(place, function); };
        done(0, +[](int, char const* message) { return new OrtStatus{message}; });
        done(26, +[](char const*, OrtCustomOpDomain** out) { *out = new OrtCustomOpDomain; return (OrtStatus*)nullptr; });
        done(27, +[](OrtCustomOpDomain* domain, ort::CustomOp const* op)
        { domain->operators[op->GetName(op)] = op; return (OrtStatus*)nullptr; });
        done(28, +[](OrtSessionOptions* options, OrtCustomOpDomain* domain) { options->domain = domain; return (OrtStatus*)nullptr; });
        done(51, +[](OrtValue* value, void** out) { *out = value->memory.get(); return (OrtStatus*)nullptr; });
        done(60, +[](OrtTensorTypeAndShapeInfo* info, int* out) { *out = info->value->type; return (OrtStatus*)nullptr; });
        done(61, +[](OrtTensorTypeAndShapeInfo* info, size_t* out) { *out = info->value->dims.size(); return (OrtStatus*)nullptr; });
        done(62, +[](OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t count)
        { std::copy_n(info->value->dims.data(), count, out); return (OrtStatus*)nullptr; });
        done(65, +[](OrtValue const* value, OrtTensorTypeAndShapeInfo** out)
        { *out = new OrtTensorTypeAndShapeInfo{value}; return (OrtStatus*)nullptr; });
        done(85, +[](OrtKernelInfo const* info, char const*, float* out) { *out = info->scale; return (OrtStatus*)nullptr; });
        done(86, +[](OrtKernelInfo const* info, char const* name, int64_t* out)
        {
            auto const found = info->integers.find(name);
            *out = found == info->integers.end() ? 0 : found->second;
            return found == info->integers.end() ? new OrtStatus{"no such attribute"} : nullptr;
        });
        done(88, +[](OrtKernelContext* context, size_t* out) { *out = context->inputs.size(); return (OrtStatus*)nullptr; });
        done(90, +[](OrtKernelContext* context, size_t index, OrtValue const** out)
        { *out = context->inputs.at(index); return (OrtStatus*)nullptr; });
        done(91, +[](OrtKernelContext* context, size_t index, int64_t const* dims, size_t count, OrtValue** out)
        {
            expect(index == context->outputs.size(), "outputs in order");
            context->outputs.push_back(std::make_unique<OrtValue>(gRunning->GetOutputType(gRunning, index), Dims(dims, dims + count)));
            *out = context->outputs.back().get();
            return (OrtStatus*)nullptr;
        });
        set(93, +[](OrtStatus* status) { delete status; });
        set(99, +[](OrtTensorTypeAndShapeInfo* info) { delete info; });
        done(274, +[](OrtKernelContext*, void (*work)(void*, size_t), size_t total, size_t, void* data)
        {
            for (size_t i = 0; i < total; ++i)
                std::thread(work, data, i).join();
            return (OrtStatus*)nullptr;
        });
        return made;
    }();
    return table;
}

std::vector<std::unique_ptr<OrtValue>> run(
    OrtSessionOptions const& session, char const* name, OrtKernelInfo const& attributes, std::vector<OrtValue*> const& inputs)
{
    gCall = name;
    for (OrtValue const* input : inputs)
        for (size_t i = 0; i <= input->dims.size(); ++i)
            gCall += i == 0 ? " |" : " " + std::to_string(input->dims[i - 1]);
    for (auto const& [attribute, value] : attributes.integers)
        gCall += " " + attribute + "=" + std::to_string(value);
    gRunning = session.domain->operators.at(name);
    OrtKernelContext context{inputs, {}};
    std::thread([&]
    {
        void* kernel = nullptr;
        OrtStatus* const made = gRunning->CreateKernelV2(gRunning, &api(), &attributes, &kernel);
        expect(!made, made ? made->message : "");
        OrtStatus* const status = gRunning->KernelComputeV2(kernel, &context);
        expect(!status, status ? status->message : "");
        gRunning->KernelDestroy(kernel);
    }).join();
    return std::move(context.outputs);
}

void index_topk(OrtSessionOptions const& session)
{
    bool const bytes = draw(0, 1);
    int64_t const B = draw(1, 4), S = one_of({1, draw(1, 17), draw(1, 130)}), Hi = draw(1, 9), pool = one_of({1, 1, 2, 3});
    int64_t const Di = bytes ? one_of({4, 12, 64, 128}) : one_of({1, 15, 17, 64, 128});
    int64_t const G = one_of({0, 1, draw(2, 66), draw(64, 300), S > 1 ? 0 : draw(1000, 5000)});
    int64_t const sinks = one_of({0, draw(0, 9)}), window = one_of({0, draw(0, 20)});
    int64_t const forced = (sinks + pool - 1) / pool + (window ? (window + pool - 2) / pool + 1 : pool > 1);
    int64_t const k = pool * std::max<int64_t>(forced, one_of({1, draw(1, 40), G + 1, draw(1, 600)}));
    OrtValue q(bytes ? ort::kInt8 : ort::kFloat, {B, S, Hi, Di}), weights(ort::kFloat, {B, S, Hi});
    OrtValue keys(bytes ? ort::kUint8 : ort::kFloat, {B, G, Di}), lengths(ort::kInt64, {B}), scale(ort::kFloat, {B, G});
    for (int64_t i = 0; i < q.size; ++i)
        bytes ? void(q.as<int8_t>()[i] = draw(-63, 63)) : void(q.as<float>()[i] = draw(-9, 9));
    for (int64_t i = 0; i < weights.size; ++i)
        weights.as<float>()[i] = draw(-9, 9);
    for (int64_t b = 0; b < B; ++b)
    {
        int64_t const length = one_of({-3, 0, 1, S, k, k + 1, G * pool - 1, G * pool, G * pool + 7, draw(0, G * pool)});
        lengths.as<int64_t>()[b] = length;
        for (int64_t g = b * G; g < b * G + std::min(length / pool, G); ++g) // the others are poison
        {
            scale.as<float>()[g] = draw(1, 9);
            for (int64_t i = g * Di; i < (g + 1) * Di; ++i)
                bytes ? void(keys.as<uint8_t>()[i] = draw(0, 255)) : void(keys.as<float>()[i] = draw(-9, 9));
        }
    }
    std::vector<OrtValue*> inputs{&q, &weights, &keys, &lengths};
    if (bytes)
        inputs.push_back(&scale);
    auto const outputs = run(session, "IndexTopK", {{{"k", k}, {"sinks", sinks}, {"window", window}, {"pool", pool}}, 0}, inputs);
    for (int64_t i = 0; i < outputs[0]->size; ++i)
    {
        int64_t const b = i / k / S, position = lengths.as<int64_t>()[b] - S + i / k % S, index = outputs[0]->as<int32_t>()[i];
        expect(-1 <= index && index <= std::max<int64_t>(position, -1) && index < G * pool, "an index that is not visible");
    }
}

void attention(OrtSessionOptions const& session)
{
    bool const sparse = draw(0, 1), half = draw(0, 1), poison = draw(0, 4) == 0; // attended rows with what is not finite
    int64_t const B = draw(1, 3), S = one_of({1, draw(1, 4), draw(1, 40)}), Hkv = draw(1, 3), G = draw(1, 9);
    int64_t const C = one_of({0, 1, draw(2, 66), draw(64, 300), S > 4 ? 9 : draw(300, 9000)}), D = one_of({1, 3, 15, 17, 36, 64, 128});
    int64_t const K = one_of({0, 1, draw(1, 66), draw(64, 700), S > 4 ? 9 : draw(700, 5000)});
    OrtValue q(ort::kFloat, {B, Hkv * G, S, D}), k_cache(half ? ort::kFloat16 : ort::kFloat, {B, Hkv, C, D}), v_cache(k_cache.type, k_cache.dims);
    OrtValue which(sparse ? ort::kInt32 : ort::kInt64, sparse ? Dims{B, S, K} : Dims{B});
    for (int64_t i = 0; i < q.size; ++i)
        q.as<float>()[i] = draw(-9, 9) / 9.0f;
    for (int64_t b = 0; b < B; ++b)
    {
        std::vector<bool> seen(C);
        int64_t const length = one_of({-3, 0, 1, S, C - 1, C, C + 3, draw(0, C)});
        if (!sparse)
            which.as<int64_t>()[b] = length;
        std::fill_n(seen.begin(), sparse ? 0 : std::clamp<int64_t>(length, 0, C), true);
        for (int64_t i = b * S * K; sparse && i < (b + 1) * S * K; ++i)
        {
            int64_t const index = C == 0 || draw(0, 9) == 0 ? one_of({-1, C, INT32_MIN, INT32_MAX}) : draw(0, C - 1);
            which.as<int32_t>()[i] = index;
            if (index >= 0 && index < C)
                seen[index] = true;
        }
        for (int64_t row = b * Hkv * C; row < (b + 1) * Hkv * C; ++row)
            for (int64_t i = row * D; seen[row % C] && i < (row + 1) * D; ++i)
                for (OrtValue* cache : {&k_cache, &v_cache})
                    if (half)
                        cache->as<uint16_t>()[i] = poison ? draw(0, 65535) : draw(0, 1) * 0x8000 + draw(0, 0x3C00); // up to 1
                    else
                        cache->as<float>()[i] = poison && draw(0, 9) == 0 ? one_of({0, 1}) ? std::nanf("1") : -INFINITY : draw(-9, 9) / 9.0f;
    }
    auto const outputs
        = run(session, sparse ? "SparseAttention" : "DenseAttention", {{}, 0.25f}, {&q, &k_cache, &v_cache, &which});
    for (int64_t i = 0; i < outputs[0]->size; ++i)
        expect(poison || std::isfinite(outputs[0]->as<float>()[i]), "an output that is not finite");
}

void rounding(OrtSessionOptions const& session)
{
    OrtValue numbers(ort::kFloat, {draw(1, 4), draw(1, 130), draw(1, 9), one_of({0, 1, 3, 4, 36, 64, 128})});
    OrtValue weights(ort::kFloat, {numbers.dims[0], numbers.dims[1], numbers.dims[2]});
    float const unit = std::exp2f(draw(-149, 120));
    for (int64_t i = 0; i < numbers.size; ++i)
        numbers.as<float>()[i] = draw(0, 999) ? unit * draw(-99, 99) : one_of({0, 1}) ? NAN : INFINITY;
    std::fill_n(weights.as<float>(), weights.size, 1.0f);
    run(session, "RoundKeys", {}, {&numbers});
    run(session, "RoundQueries", {}, {&numbers, &weights});
}

} // namespace

/// Instead of the C library's: the work is cut for as many processors as a call wants.
extern "C" int sched_getaffinity(pid_t, size_t bytes, cpu_set_t* set) noexcept
{
    CPU_ZERO_S(bytes, set);
    for (int i = 0; i < gProcessors; ++i)
        CPU_SET_S(i, bytes, set);
    return 0;
}

int main(int, char** argv)
{
    ort::ApiBase const base{[](uint32_t) { return &api(); }, [] { return "fake"; }};
    OrtSessionOptions session;
    expect(!RegisterCustomOps(&session, &base), "RegisterCustomOps");
    for (int64_t i = 0; i < std::atoll(argv[1]); ++i)
    {
        gProcessors = one_of({1, 2, 4, 16, 64});
        int64_t const what = draw(0, 8);
        (what < 4 ? index_topk : what < 8 ? attention : rounding)(session);
    }
}
