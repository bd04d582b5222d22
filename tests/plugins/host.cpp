// A host for the plugin library, in TensorRT's place: drives every IPluginV3 method through NVIDIA's headers.
//
//   host check LIBRARY              every method on good and bad input; prints what fails; needs no GPU
//   host workspace LIBRARY CASE     bytes of workspace for the shapes of CASE
//   host run LIBRARY CASE COPIES REPEATS GRAPH
//                                   COPIES contexts on their own threads and streams, each enqueueing REPEATS times; with
//                                   GRAPH = 1 through a captured CUDA graph. All outputs must be bitwise equal; the first is
//                                   written. Needs a GPU (or the fake driver beside this file, which records the launches).
//
// CASE is a text file:
//   plugin NAME ATTRIBUTE VALUE ...
//   input TYPE RANK DIMS... PATH    the tensors' bytes; "-": left as allocated
//   output TYPE RANK DIMS... PATH
#include "NvInferRuntime.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

using namespace nvinfer1;

namespace
{

std::string gLogged; // by the library, since the last reset

struct Logger : ILogger
{
    void log(Severity, char const* message) noexcept override
    {
        gLogged += std::string(message) + "\n";
        std::fprintf(stderr, "%s\n", message);
    }
};

struct LoggerFinder : ILoggerFinder
{
    Logger logger;
    ILogger* findLogger() override
    {
        return &logger;
    }
};

[[noreturn]] void fail(std::string const& message)
{
    std::cerr << "host: " << message << std::endl;
    std::exit(1);
}

// Expressions of getOutputShapes, as constants.
struct Expression : IDimensionExpr, apiv::VDimensionExpr
{
    int64_t value;
    explicit Expression(int64_t v) : value(v)
    {
        IDimensionExpr::mImpl = this;
    }
    bool isConstant() const override
    {
        return true;
    }
    int64_t getConstantValue() const override
    {
        return value;
    }
    bool isSizeTensor() const override
    {
        return false;
    }
};

struct Expressions : IExprBuilder, apiv::VExprBuilder
{
    std::vector<std::unique_ptr<Expression>> made;
    Expressions()
    {
        IExprBuilder::mImpl = this;
    }
    IDimensionExpr const* constant(int64_t value) override
    {
        made.push_back(std::make_unique<Expression>(value));
        return made.back().get();
    }
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return nullptr;
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return nullptr;
    }
};

struct Library
{
    std::map<std::string, IPluginCreatorV3One*> creators;
    LoggerFinder finder;

    explicit Library(char const* path)
    {
        void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (handle == nullptr)
        {
            fail(dlerror());
        }
        auto* setFinder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"));
        using Get = IPluginCreatorInterface* const* (*)(int32_t&);
        auto* get = reinterpret_cast<Get>(dlsym(handle, "getCreators"));
        if (setFinder == nullptr || get == nullptr)
        {
            fail("setLoggerFinder or getCreators is not exported");
        }
        setFinder(&finder);
        int32_t count = 0;
        IPluginCreatorInterface* const* all = get(count);
        for (int32_t i = 0; i < count; ++i)
        {
            auto* creator = static_cast<IPluginCreatorV3One*>(all[i]);
            creators[creator->getPluginName()] = creator;
        }
    }
};

struct Tensor
{
    PluginTensorDesc desc{};
    std::string path;
    bool isOutput{false};

    std::size_t bytes() const
    {
        std::size_t size = desc.type == DataType::kINT64 ? 8 : desc.type == DataType::kFP8 ? 1
            : desc.type == DataType::kINT32 || desc.type == DataType::kFLOAT ? 4 : 2;
        for (int32_t i = 0; i < desc.dims.nbDims; ++i)
        {
            size *= static_cast<std::size_t>(desc.dims.d[i]);
        }
        return size;
    }
};

PluginTensorDesc describe(DataType type, std::vector<int64_t> const& dims, TensorFormat format = TensorFormat::kLINEAR)
{
    PluginTensorDesc desc{};
    desc.dims.nbDims = static_cast<int32_t>(dims.size());
    std::copy(dims.begin(), dims.end(), desc.dims.d);
    desc.type = type;
    desc.format = format;
    desc.scale = 1.0F;
    return desc;
}

DynamicPluginTensorDesc dynamic(PluginTensorDesc const& desc)
{
    return {desc, desc.dims, desc.dims, desc.dims};
}

struct Case
{
    std::string plugin;
    std::map<std::string, double> attributes;
    std::vector<Tensor> tensors; // inputs, then the output

    explicit Case(char const* path)
    {
        std::map<std::string, DataType> const types{{"fp16", DataType::kHALF}, {"bf16", DataType::kBF16},
            {"fp32", DataType::kFLOAT}, {"fp8", DataType::kFP8}, {"int32", DataType::kINT32}, {"int64", DataType::kINT64}};
        std::ifstream file(path);
        std::string line;
        while (std::getline(file, line))
        {
            std::istringstream words(line);
            std::string kind, type;
            words >> kind;
            if (kind == "plugin")
            {
                std::string attribute;
                words >> plugin;
                while (words >> attribute)
                {
                    words >> attributes[attribute];
                }
                continue;
            }
            std::size_t rank{};
            words >> type >> rank;
            std::vector<int64_t> dims(rank);
            for (int64_t& dim : dims)
            {
                words >> dim;
            }
            Tensor tensor{describe(types.at(type), dims), "", kind == "output"};
            words >> tensor.path;
            if (!words)
            {
                fail("cannot read: " + line);
            }
            tensors.push_back(tensor);
        }
    }

    int32_t inputs() const
    {
        return static_cast<int32_t>(tensors.size()) - 1;
    }

    std::vector<PluginTensorDesc> descriptions() const
    {
        std::vector<PluginTensorDesc> all;
        for (Tensor const& tensor : tensors)
        {
            all.push_back(tensor.desc);
        }
        return all;
    }

    std::vector<DynamicPluginTensorDesc> dynamics() const
    {
        std::vector<DynamicPluginTensorDesc> all;
        for (Tensor const& tensor : tensors)
        {
            all.push_back(dynamic(tensor.desc));
        }
        return all;
    }
};

template <typename Interface>
Interface* capability(IPluginV3* plugin, PluginCapabilityType type)
{
    return static_cast<Interface*>(plugin->getCapabilityInterface(type));
}

IPluginV3OneBuild* build(IPluginV3* plugin)
{
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime* runtime(IPluginV3* plugin)
{
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

IPluginV3* create(Library& library, std::string const& name, std::vector<PluginField> fields)
{
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return library.creators.at(name)->createPlugin("layer", &collection, TensorRTPhase::kBUILD);
}

IPluginV3* create(Library& library, Case const& problem)
{
    std::map<std::string, int64_t> integers;
    float real{};
    std::vector<PluginField> fields;
    for (auto const& [name, value] : problem.attributes)
    {
        if (name == "scale")
        {
            real = static_cast<float>(value);
            fields.emplace_back(name.c_str(), &real, PluginFieldType::kFLOAT32, 1);
        }
        else
        {
            integers[name] = static_cast<int64_t>(value);
            fields.emplace_back(name.c_str(), &integers[name], PluginFieldType::kINT64, 1);
        }
    }
    IPluginV3* plugin = create(library, problem.plugin, fields);
    if (plugin == nullptr)
    {
        fail("plugin not created");
    }
    return plugin;
}

// ---------------------------------------------------------------------------------------------------------------- check

int gFailures = 0;

void expect(bool holds, std::string const& what)
{
    if (!holds)
    {
        std::cout << "FAILED: " << what << std::endl;
        ++gFailures;
    }
}

// The call fails, and the library says why.
void expectError(bool failed, std::string const& message, std::string const& what)
{
    expect(failed, what + " must fail");
    expect(gLogged.find(message) != std::string::npos, what + " must log '" + message + "', logged: " + gLogged);
    gLogged.clear();
}

using Descriptions = std::vector<PluginTensorDesc>;

std::vector<DynamicPluginTensorDesc> dynamic(Descriptions const& all)
{
    std::vector<DynamicPluginTensorDesc> result;
    for (PluginTensorDesc const& desc : all)
    {
        result.push_back(dynamic(desc));
    }
    return result;
}

// What holds for both plugins: `good` are the descriptions of n inputs (4, or 5 with an optional one) and 1 output.
void checkPlugin(
    IPluginV3* plugin, char const* name, Descriptions const& good, std::string const& cacheId, int32_t attributes)
{
    int32_t const n = static_cast<int32_t>(good.size()) - 1;
    auto* core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
    expect(!std::strcmp(core->getPluginName(), name) && !std::strcmp(core->getPluginVersion(), "1")
            && !std::strcmp(core->getPluginNamespace(), "dsa"), "name, version, namespace");
    expect(plugin->getCapabilityInterface(static_cast<PluginCapabilityType>(99)) == nullptr, "unknown capability");

    IPluginV3OneBuild* b = build(plugin);
    IPluginV3OneRuntime* r = runtime(plugin);
    expect(b->getNbOutputs() == 1, "number of outputs");
    expect(b->getTimingCacheID() != nullptr && cacheId == b->getTimingCacheID(), std::string("timing cache id ") + b->getTimingCacheID());

    DataType types[5], output{};
    for (int i = 0; i < n; ++i)
    {
        types[i] = good[i].type;
    }
    expect(b->getOutputDataTypes(&output, 1, types, n) == 0 && output == good[n].type, "output type");
    expectError(b->getOutputDataTypes(&output, 1, types, 3) != 0, "4 inputs", "output type of 3 inputs");

    Expressions expressions;
    DimsExprs inputs[5], shape{};
    for (int i = 0; i < n; ++i)
    {
        inputs[i].nbDims = good[i].dims.nbDims;
        for (int j = 0; j < inputs[i].nbDims; ++j)
        {
            inputs[i].d[j] = expressions.constant(good[i].dims.d[j]);
        }
    }
    expect(b->getOutputShapes(inputs, n, nullptr, 0, &shape, 1, expressions) == 0, "output shapes");
    expect(shape.nbDims == good[n].dims.nbDims, "rank of the output");
    for (int j = 0; j < shape.nbDims; ++j)
    {
        expect(shape.d[j]->getConstantValue() == good[n].dims.d[j], "output dimension " + std::to_string(j));
    }
    inputs[0].nbDims = 2;
    expectError(b->getOutputShapes(inputs, n, nullptr, 0, &shape, 1, expressions) != 0, "must be [B,", "output shape of rank 2");

    // Formats: the two types that the kernels have, nothing else at any position; only entries up to pos are read.
    for (DataType type : {DataType::kHALF, DataType::kBF16, DataType::kFLOAT})
    {
        for (int32_t pos = 0; pos <= n; ++pos)
        {
            Descriptions descs = good;
            for (PluginTensorDesc& desc : descs)
            {
                desc.type = desc.type == DataType::kHALF ? type : desc.type;
            }
            auto all = dynamic(descs);
            for (int32_t later = pos + 1; later <= n; ++later)
            {
                all[later].desc.type = static_cast<DataType>(99);
                all[later].desc.format = static_cast<TensorFormat>(99);
            }
            bool const first = pos == 0 || good[pos].type == DataType::kHALF;
            bool const wanted = type != DataType::kFLOAT || !first || pos > 0;
            expect(b->supportsFormatCombination(pos, all.data(), n, 1) == wanted, "format at " + std::to_string(pos));
            all[pos].desc.format = TensorFormat::kCHW32;
            expect(!b->supportsFormatCombination(pos, all.data(), n, 1), "only linear at " + std::to_string(pos));
            all[pos].desc.format = TensorFormat::kLINEAR;
            all[pos].desc.type = DataType::kINT8;
            expect(!b->supportsFormatCombination(pos, all.data(), n, 1), "no int8 at " + std::to_string(pos));
        }
    }
    expect(gLogged.find("must be fp16 or bf16, not fp32") != std::string::npos, "a word on fp32");
    gLogged.clear();
    auto const all = dynamic(good);
    expect(!b->supportsFormatCombination(n + 1, all.data(), n, 1) && !b->supportsFormatCombination(0, all.data(), 3, 1), "count");

    expect(b->configurePlugin(all.data(), n, &all[n], 1) == 0, "configure");
    expectError(b->configurePlugin(all.data(), 3, &all[n], 1) != 0, "4 inputs", "configure with 3 inputs");
    std::size_t const workspace = b->getWorkspaceSize(all.data(), n, &all[n], 1);
    expect(workspace > 0 && workspace <= (std::size_t{256} << 20), "workspace");
    int32_t tactic{};
    expect(b->getNbTactics() == 0 && b->getValidTactics(&tactic, 0) == 0 && r->setTactic(0) == 0, "tactics");
    expect(b->getFormatCombinationLimit() > 0, "format limit");

    // Serialise, create again, clone, attach: the same plugin.
    PluginFieldCollection const* fields = r->getFieldsToSerialize();
    expect(fields != nullptr && fields->nbFields == attributes + 1, "fields, and the layout");
    IPluginV3* copy = plugin->clone();
    expect(copy != nullptr && copy != plugin && cacheId == build(copy)->getTimingCacheID(), "clone");
    IPluginV3* attached = r->attachToContext(nullptr);
    expect(attached != nullptr && attached != plugin && cacheId == build(attached)->getTimingCacheID(), "attach");
    delete copy;

    // Without a driver nothing runs, and nothing crashes.
    void* const nothing[1] = {nullptr};
    void const* const none[5] = {};
    IPluginV3OneRuntime* a = runtime(attached);
    expectError(a->enqueue(good.data(), &good[n], none, nothing, nullptr, nullptr) != 0, "has no address", "null pointers");
    alignas(16) char memory[64];
    void const* const shifted[5] = {memory + 8, memory, memory, memory, memory};
    void* const target[1] = {memory};
    expectError(a->enqueue(good.data(), &good[n], shifted, target, memory, nullptr) != 0, "aligned to 16 bytes", "alignment");
    void const* const pointers[5] = {memory, memory, memory, memory, memory};
    expectError(a->enqueue(good.data(), &good[n], pointers, target, memory, nullptr) != 0, "before onShapeChange", "order");
    expectError(a->onShapeChange(good.data(), 3, &good[n], 1) != 0, "4 inputs", "onShapeChange with 3 inputs");
    if (dlopen("libcuda.so.1", RTLD_NOW) == nullptr)
    {
        expectError(a->onShapeChange(good.data(), n, &good[n], 1) != 0, "no NVIDIA driver", "no driver");
    }
    delete attached;
}

// configure, workspace and onShapeChange refuse `bad` with `message`.
void checkRefused(IPluginV3* plugin, Descriptions const& bad, std::string const& message)
{
    auto const all = dynamic(bad);
    int32_t const n = static_cast<int32_t>(bad.size()) - 1;
    expectError(build(plugin)->configurePlugin(all.data(), n, &all[n], 1) != 0, message, "configure");
    if (message.find(", got fp") == std::string::npos) // a matter of size alone
    {
        expectError(build(plugin)->getWorkspaceSize(all.data(), n, &all[n], 1) == 0, message, "workspace");
    }
    expectError(runtime(plugin)->onShapeChange(bad.data(), n, &bad[n], 1) != 0, message, "onShapeChange");
}

// As upper bounds `apart` are taken, as a call's shapes refused with `message`.
void checkBounds(IPluginV3* plugin, Descriptions const& apart, std::string const& message)
{
    auto const all = dynamic(apart);
    int32_t const n = static_cast<int32_t>(apart.size()) - 1;
    expect(build(plugin)->configurePlugin(all.data(), n, &all[n], 1) == 0, "configure with bounds that differ");
    expect(build(plugin)->getWorkspaceSize(all.data(), n, &all[n], 1) > 0, "workspace of bounds that differ");
    expectError(runtime(plugin)->onShapeChange(apart.data(), n, &apart[n], 1) != 0, message, "onShapeChange");
}

int check(Library& library)
{
    constexpr DataType kH = DataType::kHALF, kI = DataType::kINT32, kL = DataType::kINT64, kF8 = DataType::kFP8;
    expect(library.creators.size() == 2, "two creators");
    for (auto const& [name, creator] : library.creators)
    {
        expect(!std::strcmp(creator->getPluginVersion(), "1") && !std::strcmp(creator->getPluginNamespace(), "dsa"), "creator");
        expect(creator->getFieldNames()->nbFields == (name == "IndexTopK" ? 6 : 3), "names of the attributes");
        expectError(creator->createPlugin("layer", nullptr, TensorRTPhase::kBUILD) == nullptr, "no attributes", name);
    }

    // Attributes.
    int32_t k32 = 64;
    int64_t k = 64, tooMany = 4097, none = 0, minus = -1, three = 3, four = 4, huge = int64_t{1} << 62;
    float scale = 0.125F, infinite = 1.0F / 0.0F, negative = -1.0F;
    double scale64 = 0.125;
    PluginField const version{"plugin_version", "1", PluginFieldType::kCHAR, 1};
    PluginField const space{"plugin_namespace", "dsa", PluginFieldType::kCHAR, 3};
    PluginField const goodK{"k", &k, PluginFieldType::kINT64, 1}, goodScale{"scale", &scale, PluginFieldType::kFLOAT32, 1};
    auto const integer = [](char const* name, int64_t const& value) {
        return PluginField{name, &value, PluginFieldType::kINT64, 1};
    };
    struct Bad
    {
        char const* plugin;
        std::vector<PluginField> fields;
        char const* message;
    };
    std::vector<Bad> const bad{
        {"IndexTopK", {}, "attribute k is missing"},
        {"IndexTopK", {{"k", &none, PluginFieldType::kINT64, 1}}, "attribute k must be 1 to 4096, got 0"},
        {"IndexTopK", {{"k", &tooMany, PluginFieldType::kINT64, 1}}, "attribute k must be 1 to 4096, got 4097"},
        {"IndexTopK", {{"k", &scale, PluginFieldType::kFLOAT32, 1}}, "attribute k must be an integer"},
        {"IndexTopK", {integer("k", k), integer("pool", three)}, "attribute pool must be at least 1 and divide k = 64, got 3"},
        {"IndexTopK", {integer("k", k), integer("pool", none)}, "attribute pool must be at least 1 and divide k = 64, got 0"},
        {"IndexTopK", {integer("k", k), integer("sinks", minus)}, "attribute sinks must be 0 to 64, got -1"},
        {"IndexTopK", {integer("window", huge), integer("k", k)}, "attribute window must be 0 to 64, got 4611686018427387904"},
        {"IndexTopK", {integer("k", k), {"window", &scale, PluginFieldType::kFLOAT32, 1}}, "attribute window must be an integer"},
        {"IndexTopK", {integer("k", k), integer("sinks", three), integer("window", k), integer("pool", four)},
            "attributes sinks = 3, window = 64 and pool = 4 always select 72 keys: k = 64"},
        {"IndexTopK", {integer("sinks", four)}, "attribute k is missing"},
        {"IndexTopK", {{"k", &k, PluginFieldType::kINT64, 2}}, "attribute k must be one integer"},
        {"IndexTopK", {{"k", nullptr, PluginFieldType::kINT64, 1}}, "attribute k must be one integer"},
        {"IndexTopK", {goodK, {"scale", &scale, PluginFieldType::kFLOAT32, 1}}, "unknown attribute scale"},
        {"IndexTopK", {goodK, {"plugin_version", "2", PluginFieldType::kCHAR, 1}}, "attribute plugin_version must be \"1\", got \"2\""},
        {"SparseAttention", {goodScale, {"plugin_namespace", "x", PluginFieldType::kCHAR, 1}}, "attribute plugin_namespace must be \"dsa\""},
        {"SparseAttention", {version, space}, "attribute scale is missing"},
        {"SparseAttention", {{"scale", &infinite, PluginFieldType::kFLOAT32, 1}}, "attribute scale must be positive and finite"},
        {"SparseAttention", {{"scale", &negative, PluginFieldType::kFLOAT32, 1}}, "attribute scale must be positive and finite"},
        {"SparseAttention", {{"scale", &k, PluginFieldType::kINT64, 1}}, "attribute scale must be a floating-point number"},
    };
    for (Bad const& one : bad)
    {
        expectError(create(library, one.plugin, one.fields) == nullptr, one.message, one.plugin);
    }
    for (auto const& [name, fields] : std::vector<std::pair<char const*, std::vector<PluginField>>>{
             {"IndexTopK", {{"k", &k32, PluginFieldType::kINT32, 1}, version, space}},
             {"IndexTopK", {integer("pool", four), integer("sinks", three), integer("window", four), goodK}},
             {"SparseAttention", {{"scale", &scale64, PluginFieldType::kFLOAT64, 1}, version, space}}})
    {
        IPluginV3* plugin = create(library, name, fields);
        expect(plugin != nullptr, std::string(name) + " with all attributes");
        PluginFieldCollection const* saved = runtime(plugin)->getFieldsToSerialize();
        IPluginV3* again = library.creators.at(name)->createPlugin("", saved, TensorRTPhase::kRUNTIME);
        expect(again && !std::strcmp(build(again)->getTimingCacheID(), build(plugin)->getTimingCacheID()), "round trip");
        delete again;
        // Of another version of the library, which may have had less workspace; or of one that did not say.
        std::vector<PluginField> other(saved->fields, saved->fields + saved->nbFields);
        int64_t const layout = *static_cast<int64_t const*>(other.back().data) + 1;
        other.back().data = &layout;
        PluginFieldCollection const changed{saved->nbFields, other.data()}, older{saved->nbFields - 1, saved->fields};
        for (PluginFieldCollection const* foreign : {&changed, &older})
        {
            expectError(library.creators.at(name)->createPlugin("", foreign, TensorRTPhase::kRUNTIME) == nullptr,
                "built with another version of this library", "another layout");
        }
        delete plugin;
    }

    IPluginV3* topk = create(library, "IndexTopK", {goodK});
    Descriptions const selection{describe(kH, {2, 3, 8, 64}), describe(kH, {2, 3, 8}), describe(kH, {2, 500, 64}),
        describe(kL, {2}), describe(kI, {2, 3, 64})};
    checkPlugin(topk, "IndexTopK", selection, "k=64 sinks=0 window=0 pool=1", 4);
    auto changed = [](Descriptions descs, int tensor, std::vector<int64_t> const& dims, DataType type) {
        descs[tensor] = describe(type, dims);
        return descs;
    };
    Descriptions wide = changed(selection, 0, {2, 3, 8, 96}, kH);
    wide[2] = describe(kH, {2, 500, 96});
    checkRefused(topk, wide, "Di must be 64 or 128, got 96");
    Descriptions many = changed(selection, 0, {2, 3, 65, 64}, kH);
    many[1] = describe(kH, {2, 3, 65});
    checkRefused(topk, many, "Hi must be 1 to 64, got 65");
    checkRefused(topk, changed(selection, 0, {2, 3, 64}, kH), "index_q must be [B, S, Hi, Di], got [2, 3, 64]");
    checkRefused(topk, changed(selection, 1, {2, 3}, kH), "index_weights must be [B, S, Hi]");
    checkRefused(topk, changed(selection, 2, {2, 500}, kH), "index_k must be [B, G, Di]");
    checkRefused(topk, changed(selection, 3, {2, 1}, kL), "kv_lengths must be [B]");
    checkBounds(topk, changed(selection, 3, {3}, kL), "do not fit together");
    checkBounds(topk, changed(selection, 1, {2, 4, 8}, kH), "do not fit together");
    checkRefused(topk, changed(selection, 1, {2, 3, 9}, kH), "do not fit together");
    checkRefused(topk, changed(selection, 2, {2, (1 << 20) + 1, 64}, kH), "C must be at most 1048576");
    checkRefused(topk, changed(selection, 0, {2, 3, 8, 64}, DataType::kFLOAT), "must be fp16 or bf16, got fp32");
    auto open = dynamic(selection);
    open[0].desc.dims.d[3] = -1; // as if one profile fixed what the network leaves open
    expectError(build(topk)->configurePlugin(open.data(), 4, &open[4], 1) != 0, "Hi and Di must be fixed", "open Di");
    checkRefused(topk, changed(selection, 2, {2, 500, 64}, kF8), "beside an fp32 index_scale, got fp8 without one");
    delete topk;

    IPluginV3* grouped = create(library, "IndexTopK", {goodK, integer("sinks", three), integer("window", four), integer("pool", four)});
    Descriptions const scaled{describe(kH, {2, 3, 8, 64}), describe(kH, {2, 3, 8}), describe(kF8, {2, 500, 64}),
        describe(kL, {2}), describe(DataType::kFLOAT, {2, 500}), describe(kI, {2, 3, 64})};
    checkPlugin(grouped, "IndexTopK", scaled, "k=64 sinks=3 window=4 pool=4", 4);
    checkBounds(grouped, changed(scaled, 4, {2, 499}, DataType::kFLOAT), "index_scale must be [B, G], got [2, 499] beside index_k [2, 500, 64]");
    checkRefused(grouped, changed(scaled, 4, {2, 500, 1}, DataType::kFLOAT), "index_scale must be [B, G]");
    checkRefused(grouped, changed(scaled, 2, {2, 500, 64}, kH), "beside an fp32 index_scale, got fp16 beside fp32");
    checkRefused(grouped, changed(scaled, 4, {2, 500}, kH), "beside an fp32 index_scale, got fp8 beside fp16");
    auto const withKeys = [&](int64_t keys) {
        Descriptions result = changed(scaled, 2, {2, keys, 64}, kF8);
        result[4] = describe(DataType::kFLOAT, {2, keys});
        return result;
    };
    auto const largest = dynamic(withKeys((1 << 18) + 2)); // two rows beyond its whole groups
    expect(build(grouped)->configurePlugin(largest.data(), 5, &largest[5], 1) == 0, "configure with the largest cache");
    checkRefused(grouped, withKeys((1 << 18) + 3), "C must be at most 1048576 tokens, got 262147 keys of 4 each");
    delete grouped;

    IPluginV3* attention = create(library, "SparseAttention", {goodScale});
    Descriptions const heads{describe(kH, {2, 14, 3, 64}), describe(kH, {2, 2, 500, 64}), describe(kH, {2, 2, 500, 64}),
        describe(kI, {2, 3, 64}), describe(kH, {2, 14, 3, 64})};
    checkPlugin(attention, "SparseAttention", heads, "scale=0.125", 1);
    Descriptions narrow = changed(heads, 0, {2, 14, 3, 32}, kH);
    narrow[1] = narrow[2] = describe(kH, {2, 2, 500, 32});
    checkRefused(attention, narrow, "head size D must be 64, 128 or 576, got 32");
    checkRefused(attention, changed(heads, 0, {2, 13, 3, 64}, kH), "query heads per KV head must be 1 to 128, got 13 / 2");
    checkRefused(attention, changed(heads, 0, {2, 258, 3, 64}, kH), "query heads per KV head must be 1 to 128, got 258 / 2");
    checkRefused(attention, changed(heads, 0, {2, 14, 64}, kH), "q must be [B, Hq, S, D], got [2, 14, 64]");
    checkRefused(attention, changed(heads, 1, {2, 500, 64}, kH), "k_cache must be [B, Hkv, C, D]");
    checkBounds(attention, changed(heads, 2, {2, 2, 400, 64}, kH), "do not fit together");
    checkBounds(attention, changed(heads, 3, {3, 3, 64}, kI), "do not fit together");
    checkRefused(attention, changed(heads, 2, {2, 1, 500, 64}, kH), "do not fit together");
    checkRefused(attention, changed(heads, 3, {2, 64}, kI), "indices must be [B, S, K]");
    checkRefused(attention, changed(heads, 3, {2, 3, 5000}, kI), "K must be 1 to 4096, got 5000");
    checkRefused(attention, changed(heads, 0, {2, 14, 3, 64}, DataType::kFLOAT), "must be fp16 or bf16, got fp32");
    open = dynamic(heads);
    open[1].desc.dims.d[1] = -1;
    expectError(build(attention)->configurePlugin(open.data(), 4, &open[4], 1) != 0, "Hq, Hkv and D must be fixed", "open Hkv");
    delete attention;

    std::cout << (gFailures == 0 ? "all checks hold" : std::to_string(gFailures) + " checks failed") << std::endl;
    return gFailures == 0 ? 0 : 1;
}

// ------------------------------------------------------------------------------------------------------------------ run

// The driver, by name; every call is checked.
struct Driver
{
    void* library{dlopen("libcuda.so.1", RTLD_NOW)};

    template <typename... Arguments>
    void operator()(char const* name, Arguments... arguments) const
    {
        auto* function = reinterpret_cast<int (*)(Arguments...)>(library != nullptr ? dlsym(library, name) : nullptr);
        if (function == nullptr)
        {
            fail(std::string("no ") + name + " in libcuda.so.1");
        }
        if (int const result = function(arguments...); result != 0)
        {
            fail(std::string(name) + ": CUDA error " + std::to_string(result));
        }
    }
};

using Address = unsigned long long;

struct Context
{
    IPluginV3* plugin{};
    cudaStream_t stream{};
    std::vector<Address> addresses; // of the tensors
    Address workspace{};
    std::vector<std::vector<char>> outputs; // one per repeat
    int errors{};
};

int run(Library& library, Case const& problem, int copies, int repeats, bool graph)
{
    Driver cuda;
    void* primary{};
    int device{};
    cuda("cuInit", 0U);
    cuda("cuDeviceGet", &device, 0);
    cuda("cuDevicePrimaryCtxRetain", &primary, device);
    cuda("cuCtxSetCurrent", primary);

    IPluginV3* original = create(library, problem);
    auto const descs = problem.descriptions();
    auto const dynamics = problem.dynamics();
    int32_t const inputs = problem.inputs();
    if (build(original)->configurePlugin(dynamics.data(), inputs, &dynamics.back(), 1) != 0)
    {
        fail("configurePlugin");
    }
    std::size_t const bytes = build(original)->getWorkspaceSize(dynamics.data(), inputs, &dynamics.back(), 1);
    std::size_t const outputBytes = problem.tensors.back().bytes();

    std::vector<Context> contexts(static_cast<std::size_t>(copies));
    for (Context& context : contexts)
    {
        context.plugin = runtime(original)->attachToContext(nullptr);
        cuda("cuStreamCreate", &context.stream, 1U); // non-blocking
        cuda("cuMemAlloc_v2", &context.workspace, bytes);
        cuda("cuMemsetD8_v2", context.workspace, static_cast<unsigned char>(0xFF), bytes);
        for (Tensor const& tensor : problem.tensors)
        {
            Address address{};
            cuda("cuMemAlloc_v2", &address, tensor.bytes() + 16);
            if (!tensor.isOutput && tensor.path != "-")
            {
                std::ifstream file(tensor.path, std::ios::binary);
                std::vector<char> data((std::istreambuf_iterator<char>(file)), {});
                if (data.size() != tensor.bytes())
                {
                    fail(tensor.path + " has " + std::to_string(data.size()) + " bytes, not " + std::to_string(tensor.bytes()));
                }
                cuda("cuMemcpyHtoD_v2", address, static_cast<void const*>(data.data()), data.size());
            }
            context.addresses.push_back(address);
        }
        if (runtime(context.plugin)->onShapeChange(descs.data(), inputs, &descs.back(), 1) != 0)
        {
            fail("onShapeChange");
        }
    }

    cuda("cuCtxSynchronize"); // the copies went to the null stream, which non-blocking ones do not wait for

    auto work = [&](Context& context) {
        cuda("cuCtxSetCurrent", primary);
        auto* const* pointers = reinterpret_cast<void* const*>(context.addresses.data());
        auto enqueue = [&] {
            context.errors += runtime(context.plugin)->enqueue(descs.data(), &descs.back(), pointers, pointers + inputs,
                                  reinterpret_cast<void*>(context.workspace), context.stream) != 0;
        };
        void *captured{}, *executable{};
        if (graph)
        {
            cuda("cuStreamBeginCapture_v2", context.stream, 1); // thread-local: other threads may go on
            enqueue();
            cuda("cuStreamEndCapture", context.stream, &captured);
            cuda("cuGraphInstantiateWithFlags", &executable, captured, 0ULL);
        }
        for (int repeat = 0; repeat < repeats; ++repeat)
        {
            Address const output = context.addresses.back();
            cuda("cuMemsetD8Async", output, static_cast<unsigned char>(0xFF), outputBytes, context.stream);
            if (graph)
            {
                cuda("cuGraphLaunch", executable, context.stream);
            }
            else
            {
                enqueue();
            }
            cuda("cuStreamSynchronize", context.stream);
            context.outputs.emplace_back(outputBytes);
            cuda("cuMemcpyDtoH_v2", static_cast<void*>(context.outputs.back().data()), output, outputBytes);
        }
    };
    std::vector<std::thread> threads;
    for (Context& context : contexts)
    {
        threads.emplace_back(work, std::ref(context));
    }
    for (std::thread& thread : threads)
    {
        thread.join();
    }

    std::vector<char> const& first = contexts[0].outputs[0];
    for (Context const& context : contexts)
    {
        if (context.errors != 0)
        {
            fail("enqueue failed");
        }
        for (auto const& output : context.outputs)
        {
            if (output != first)
            {
                fail("outputs differ between repeats or contexts");
            }
        }
        delete context.plugin;
    }
    delete original;
    std::ofstream(problem.tensors.back().path, std::ios::binary).write(first.data(), static_cast<std::streamsize>(first.size()));
    return 0;
}

} // namespace

int main(int argc, char** argv)
{
    std::string const command = argc > 1 ? argv[1] : "";
    if (command == "check" && argc == 3)
    {
        Library library(argv[2]);
        return check(library);
    }
    if (command == "workspace" && argc == 4)
    {
        Library library(argv[2]);
        Case const problem(argv[3]);
        auto const dynamics = problem.dynamics();
        IPluginV3* plugin = create(library, problem);
        std::cout << build(plugin)->getWorkspaceSize(dynamics.data(), problem.inputs(), &dynamics.back(), 1) << std::endl;
        return 0;
    }
    if (command == "run" && argc == 7)
    {
        Library library(argv[2]);
        return run(library, Case(argv[3]), std::atoi(argv[4]), std::atoi(argv[5]), std::atoi(argv[6]) != 0);
    }
    fail("usage: host check LIBRARY | workspace LIBRARY CASE | run LIBRARY CASE COPIES REPEATS GRAPH");
}
