// dsa::IndexTopK as a TensorRT plugin: checks and launches; the mathematics is in score.py and selection.py, the contract in op.py.
#include "constants.h"
#include "plugin.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace dsa
{
namespace
{

using namespace nvinfer1;
namespace size = index_topk; // generated from plan.py

// Positions of the inputs; the output is behind them, indices [B, S, k] int32.
enum Input : int32_t
{
    kQ,       // [B, S, Hi, Di] fp16 | bf16
    kWeights, // [B, S, Hi]     same type
    kKeys,    // [B, G, Di]     same type, or fp8 with kScale
    kLengths, // [B]            int64
    kScale,   // [B, G]         fp32; optional
};
constexpr int32_t kInputs = kScale;
constexpr char const* kCount = "4 inputs, or 5 with index_scale, and 1 output are needed";

bool isCount(int32_t nbInputs)
{
    return nbInputs == kInputs || nbInputs == kInputs + 1;
}

struct Shape
{
    int64_t B, S, C, Hi, Di; // C rows of keys: G of op.py
};

// `scale` is null without index_scale; `pool`: tokens per row of keys; `bounds`: these are upper bounds, which may differ
// between tensors that have B, S or G in common.
Shape shapeOf(Dims const& q, Dims const& weights, Dims const& keys, Dims const& lengths, Dims const* scale, int64_t pool,
    bool bounds)
{
    auto const same = [bounds](int64_t one, int64_t other) { return bounds || one == other; };
    require(q.nbDims == 4, "index_q must be [B, S, Hi, Di], got " + text(q));
    require(weights.nbDims == 3, "index_weights must be [B, S, Hi], got " + text(weights));
    require(keys.nbDims == 3, "index_k must be [B, G, Di], got " + text(keys));
    require(lengths.nbDims == 1, "kv_lengths must be [B], got " + text(lengths));
    Shape const shape{q.d[0], q.d[1], keys.d[1], q.d[2], q.d[3]};
    require(same(weights.d[0], shape.B) && same(weights.d[1], shape.S) && weights.d[2] == shape.Hi
            && same(keys.d[0], shape.B) && keys.d[2] == shape.Di && same(lengths.d[0], shape.B),
        "index_q " + text(q) + ", index_weights " + text(weights) + ", index_k " + text(keys) + " and kv_lengths "
            + text(lengths) + " do not fit together");
    require(scale == nullptr || (scale->nbDims == 2 && same(scale->d[0], shape.B) && same(scale->d[1], shape.C)),
        "index_scale must be [B, G], got " + text(scale != nullptr ? *scale : Dims{}) + " beside index_k " + text(keys));
    require(shape.Di == 64 || shape.Di == 128, "the indexer head size Di must be 64 or 128, got " + std::to_string(shape.Di));
    require(shape.Hi >= 1 && shape.Hi <= size::MAX_HEADS,
        "the number of indexer heads Hi must be 1 to " + std::to_string(size::MAX_HEADS) + ", got " + std::to_string(shape.Hi));
    // A cache of pooled keys has two rows more than whole groups fit.
    require(shape.C >= 0 && shape.C <= size::MAX_CAPACITY / pool + (pool == 1 ? 0 : 2),
        "the cache capacity C must be at most " + std::to_string(size::MAX_CAPACITY) + " tokens, got "
            + std::to_string(shape.C) + " keys of " + std::to_string(pool) + " each");
    return shape;
}

void checkTypes(DataType q, DataType keys, DataType const* scale)
{
    kernelType(q);
    require(scale == nullptr ? keys == q : keys == DataType::kFP8 && *scale == DataType::kFLOAT,
        std::string("index_k must have index_q's type, or fp8 beside an fp32 index_scale, got ") + typeName(keys)
            + (scale == nullptr ? " without one" : std::string(" beside ") + typeName(*scale)));
}

int64_t paddedHeads(int64_t heads)
{
    return *std::find_if(std::begin(size::HEADS_PADDED), std::end(size::HEADS_PADDED),
        [heads](int64_t padded) { return heads <= padded; });
}

// How a problem is cut; the same numbers as `plan` in plan.py.
struct Plan
{
    int64_t batchTile, queryTile, blockS, blockC, blocks, splits, capacity, listed;
};

int64_t listEntries(int64_t k)
{
    return 4 * k <= size::SHORT_LIST ? size::SHORT_LIST : size::LONG_LIST;
}

int64_t paddedCapacity(int64_t C)
{
    return ceilDiv(C, size::ROW_ALIGNMENT) * size::ROW_ALIGNMENT;
}

// The lists of a tile, or of any smaller one.
int64_t splitBytes(int64_t rows, int64_t C, int64_t k)
{
    int64_t const entries = listEntries(k);
    int64_t const splits = std::min<int64_t>(rows * size::MAX_SPLITS, size::SELECT_PROGRAMS);
    return entries < C ? 4 * splits * (entries + 1) : 0;
}

int64_t evenTile(int64_t count, int64_t most, int64_t step)
{
    bool const stepped = most > step;
    most = stepped ? most / step * step : most;
    int64_t const tile = ceilDiv(count, ceilDiv(count, most));
    return stepped ? std::min(count, ceilDiv(tile, step) * step) : tile;
}

Plan planOf(Shape const& shape, int64_t k)
{
    Plan plan{};
    int64_t const columns = shape.S == 1 ? size::DECODE_COLUMNS : size::PREFILL_COLUMNS;
    plan.blockS = std::max<int64_t>(columns / paddedHeads(shape.Hi), 1);
    plan.blockC = size::KEY_NUMBERS / shape.Di;
    plan.capacity = paddedCapacity(shape.C);
    plan.listed = listEntries(k);
    int64_t const fitting = size::SCORE_BYTES / (4 * std::max<int64_t>(plan.capacity, 1));
    int64_t const most = std::min<int64_t>(std::max<int64_t>(fitting, 1), size::SELECT_PROGRAMS);
    plan.queryTile = evenTile(shape.S, most, plan.blockS);
    plan.batchTile = evenTile(shape.B, most / plan.queryTile, 1);
    int64_t const rows = plan.batchTile * plan.queryTile;
    int64_t const work = plan.batchTile * ceilDiv(plan.queryTile, plan.blockS) * (plan.capacity / plan.blockC);
    plan.blocks = std::min<int64_t>(std::max<int64_t>(work / size::SCORE_PROGRAMS, 1), size::MAX_BLOCKS);
    plan.splits = std::min({std::max<int64_t>(size::SELECT_PROGRAMS / rows, 1), int64_t{size::MAX_SPLITS},
        ceilDiv(shape.C, size::SELECT_BLOCK)});
    plan.splits = shape.C > plan.listed ? plan.splits : 0;
    return plan;
}

class IndexTopK final : public Plugin<IndexTopK>
{
public:
    static constexpr char const* kName = "IndexTopK";

    static PluginFieldCollection const& attributeFields()
    {
        static PluginField const fields[] = {{"k", nullptr, PluginFieldType::kINT64, 1},
            {"sinks", nullptr, PluginFieldType::kINT64, 1}, {"window", nullptr, PluginFieldType::kINT64, 1},
            {"pool", nullptr, PluginFieldType::kINT64, 1}, {"plugin_version", nullptr, PluginFieldType::kCHAR, 1}, {"plugin_namespace", nullptr, PluginFieldType::kCHAR, 1}};
        static PluginFieldCollection const collection{6, fields};
        return collection;
    }

    explicit IndexTopK(PluginFieldCollection const& fields)
    {
        for (int32_t i = 0; i < fields.nbFields; ++i)
        {
            PluginField const& field = fields.fields[i];
            auto const own = std::find_if(kAttributes.begin(), kAttributes.end(),
                [&](auto const& attribute) { return field.name != nullptr && std::strcmp(field.name, attribute.name) == 0; });
            if (own != kAttributes.end())
            {
                this->*own->value = integerOf(field);
            }
            else
            {
                checkCommonAttribute(field);
            }
        }
        auto const inRange = [](char const* name, int64_t value, int64_t least, int64_t most) {
            require(value >= least && value <= most, std::string("attribute ") + name + " must be " + std::to_string(least)
                    + " to " + std::to_string(most) + ", got " + std::to_string(value));
        };
        require(mK != kMissing, "attribute k is missing");
        inRange("k", mK, 1, size::MAX_K);
        inRange("sinks", mSinks, 0, mK);
        inRange("window", mWindow, 0, mK);
        require(mPool >= 1 && mK % mPool == 0, "attribute pool must be at least 1 and divide k = " + std::to_string(mK)
                + ", got " + std::to_string(mPool));
        // As forced_groups in op.py.
        int64_t const latest = mWindow > 0 ? ceilDiv(mWindow - 1, mPool) + 1 : mPool > 1 ? 1 : 0;
        int64_t const always = mPool * (ceilDiv(mSinks, mPool) + latest);
        require(always <= mK, "attributes sinks = " + std::to_string(mSinks) + ", window = " + std::to_string(mWindow)
                + " and pool = " + std::to_string(mPool) + " always select " + std::to_string(always) + " keys: k = "
                + std::to_string(mK));
        for (Attribute const& attribute : kAttributes)
        {
            mTimingCacheId += (mTimingCacheId.empty() ? "" : " ") + std::string(attribute.name) + "="
                + std::to_string(this->*attribute.value);
        }
    }

    bool supportsFormatCombination(
        int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept override
    {
        if (!isCount(nbInputs) || nbOutputs != 1 || pos < 0 || pos > nbInputs
            || inOut[pos].desc.format != TensorFormat::kLINEAR)
        {
            return false;
        }
        DataType const type = inOut[pos].desc.type;
        if (pos == kQ && type == DataType::kFLOAT)
        {
            // TensorRT itself only says that no format fits.
            log(ILogger::Severity::kWARNING, std::string("dsa::") + kName + ": index_q must be fp16 or bf16, not fp32");
        }
        bool const scaled = nbInputs > kScale;
        switch (pos)
        {
        case kQ: return isHalfOrBfloat(type);
        case kWeights: return type == inOut[kQ].desc.type;
        case kKeys: return type == (scaled ? DataType::kFP8 : inOut[kQ].desc.type);
        case kLengths: return type == DataType::kINT64;
        default: return type == (scaled && pos == kScale ? DataType::kFLOAT : DataType::kINT32);
        }
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*,
        int32_t nbOutputs) noexcept override
    {
        return guarded(kName, -1, [&] {
            require(isCount(nbInputs) && nbOutputs == 1, kCount);
            checkTypes(in[kQ].desc.type, in[kKeys].desc.type, nbInputs > kScale ? &in[kScale].desc.type : nullptr);
            largest(in, nbInputs);
            require(in[kQ].desc.dims.d[2] > 0 && in[kQ].desc.dims.d[3] > 0,
                "Hi and Di must be fixed in the network, index_q is " + text(in[kQ].desc.dims));
            return 0;
        });
    }

    int32_t getOutputDataTypes(
        DataType* outputTypes, int32_t nbOutputs, DataType const*, int32_t nbInputs) const noexcept override
    {
        return guarded(kName, -1, [&] {
            require(isCount(nbInputs) && nbOutputs == 1, kCount);
            outputTypes[0] = DataType::kINT32;
            return 0;
        });
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs,
        int32_t nbOutputs, IExprBuilder& expressions) noexcept override
    {
        return guarded(kName, -1, [&] {
            require(isCount(nbInputs) && nbOutputs == 1, kCount);
            require(inputs[kQ].nbDims == 4, "index_q must be [B, S, Hi, Di]");
            outputs[0].nbDims = 3;
            outputs[0].d[0] = inputs[kQ].d[0];
            outputs[0].d[1] = inputs[kQ].d[1];
            outputs[0].d[2] = expressions.constant(mK);
            require(outputs[0].d[2] != nullptr, "TensorRT made no expression for k");
            return 0;
        });
    }

    // Of the largest shapes of the profile; see `largest_workspace` in plan.py.
    std::size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*,
        int32_t) const noexcept override
    {
        return guarded<std::size_t>(kName, 0, [&] {
            require(isCount(nbInputs), kCount);
            Shape const most = largest(in, nbInputs);
            int64_t const rows = most.B * most.S, row = 4 * paddedCapacity(most.C);
            int64_t const scores = std::min(rows * row, std::max<int64_t>(size::SCORE_BYTES, row));
            int64_t const lists = splitBytes(std::min<int64_t>(rows, size::SELECT_PROGRAMS), most.C, groups());
            return static_cast<std::size_t>(scores + 4 * std::min<int64_t>(rows, size::SELECT_PROGRAMS) + lists);
        });
    }

    char const* getTimingCacheID() noexcept override
    {
        return mTimingCacheId.c_str();
    }

    // Loads the kernels. TensorRT calls this within enqueueV3 when a shape or an address has changed: a call before a CUDA
    // graph is captured loads them, within the capture nothing can be.
    int32_t onShapeChange(
        PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*, int32_t nbOutputs) noexcept override
    {
        return guarded(kName, -1, [&] {
            require(isCount(nbInputs) && nbOutputs == 1, kCount);
            bool const scaled = nbInputs > kScale;
            checkTypes(in[kQ].type, in[kKeys].type, scaled ? &in[kScale].type : nullptr);
            Shape const shape = current(in, scaled);
            std::string const score = std::string("index_topk_score_") + kernelType(in[kQ].type) + "_"
                + std::to_string(shape.Di) + "_" + std::to_string(paddedHeads(shape.Hi));
            std::string const fp8 = scaled ? "_fp8" : "";
            mDecode = Kernel(score + "_decode" + fp8);
            mPrefill = Kernel(score + "_prefill" + fp8);
            mGuess = Kernel("index_topk_guess");
            mFilter = Kernel("index_topk_filter");
            mFinish = Kernel("index_topk_finish_" + std::to_string(listEntries(groups())));
            return 0;
        });
    }

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        return guarded(kName, -1, [&] {
            bool const scaled = in[kKeys].type == DataType::kFP8;
            Shape const shape = current(in, scaled);
            if (shape.B * shape.S == 0)
            {
                return 0;
            }
            static constexpr std::array<char const*, kInputs + 1> kNames{
                "index_q", "index_weights", "index_k", "kv_lengths", "index_scale"};
            for (int32_t i = 0; i < kInputs + scaled; ++i)
            {
                requireAligned(inputs[i], kNames[i]);
            }
            requireAligned(outputs[0], "indices");
            requireAligned(workspace, "the workspace");
            launch(shape, inputs, scaled ? inputs[kScale] : nullptr, outputs[0], static_cast<int32_t*>(workspace), stream);
            return 0;
        });
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        for (std::size_t i = 0; i < kAttributes.size(); ++i)
        {
            mSaved[i] = {kAttributes[i].name, &(this->*kAttributes[i].value), PluginFieldType::kINT64, 1};
        }
        mSaved.back() = layoutField();
        mFields = {static_cast<int32_t>(mSaved.size()), mSaved.data()};
        return &mFields;
    }

private:
    static constexpr int64_t kMissing = INT64_MIN;

    struct Attribute
    {
        char const* name;
        int64_t IndexTopK::*value;
    };

    // Rows of keys to select.
    int64_t groups() const
    {
        return mK / mPool;
    }

    Shape largest(DynamicPluginTensorDesc const* in, int32_t nbInputs) const
    {
        Dims const* scale = nbInputs > kScale ? &in[kScale].max : nullptr;
        return shapeOf(in[kQ].max, in[kWeights].max, in[kKeys].max, in[kLengths].max, scale, mPool, true);
    }

    Shape current(PluginTensorDesc const* in, bool scaled) const
    {
        Dims const* scale = scaled ? &in[kScale].dims : nullptr;
        return shapeOf(in[kQ].dims, in[kWeights].dims, in[kKeys].dims, in[kLengths].dims, scale, mPool, false);
    }

    void launch(Shape const& shape, void const* const* inputs, void const* scale, void* indices, int32_t* workspace,
        cudaStream_t stream) const
    {
        Plan const plan = planOf(shape, groups());
        int64_t const rows = plan.batchTile * plan.queryTile;
        int32_t* keys = workspace;
        int32_t* listed = keys + rows * plan.capacity;
        int32_t* counts = listed + rows * plan.splits * plan.listed;
        int32_t* threshold = counts + rows * plan.splits;

        // Kernel arguments are 32 bits wide; shapeOf and the plan keep them there.
        int32_t const S = static_cast<int32_t>(shape.S), C = static_cast<int32_t>(shape.C);
        int32_t const K = static_cast<int32_t>(groups()), pool = static_cast<int32_t>(mPool);
        int32_t const sinks = static_cast<int32_t>(ceilDiv(mSinks, mPool)), window = static_cast<int32_t>(mWindow);
        int32_t const heads = static_cast<int32_t>(shape.Hi), blocks = static_cast<int32_t>(plan.blocks);
        int32_t const splits = static_cast<int32_t>(plan.splits), list = static_cast<int32_t>(plan.listed);
        int32_t const target = static_cast<int32_t>(std::sqrt(static_cast<double>(groups() * plan.listed)));
        unsigned const ranges = static_cast<unsigned>(ceilDiv(plan.capacity, plan.blocks * plan.blockC));
        Kernel const& score = shape.S == 1 ? mDecode : mPrefill;
        for (int64_t firstBatch = 0; firstBatch < shape.B; firstBatch += plan.batchTile)
        {
            for (int64_t firstQuery = 0; firstQuery < shape.S; firstQuery += plan.queryTile)
            {
                int32_t const batch = static_cast<int32_t>(firstBatch), query = static_cast<int32_t>(firstQuery);
                int32_t const tile = static_cast<int32_t>(std::min(plan.queryTile, shape.S - firstQuery));
                int64_t const batches = std::min(plan.batchTile, shape.B - firstBatch);
                unsigned const tileRows = static_cast<unsigned>(batches * tile);
                if (shape.C > K)
                {
                    unsigned const queryBlocks = static_cast<unsigned>(ceilDiv(tile, plan.blockS) * batches);
                    score.launch(ranges, queryBlocks,
                        {&inputs[kQ], &inputs[kWeights], &inputs[kKeys], &inputs[kLengths], &scale, &keys, &batch, &query,
                            &tile, &S, &C, &heads, &K, &pool, &sinks, &window, &blocks},
                        stream);
                }
                if (plan.splits > 0)
                {
                    mGuess.launch(tileRows, 1,
                        {&inputs[kLengths], &keys, &threshold, &batch, &query, &tile, &S, &C, &pool, &target, &list},
                        stream);
                    mFilter.launch(plan.splits, tileRows,
                        {&inputs[kLengths], &keys, &listed, &counts, &threshold, &batch, &query, &tile, &S, &C, &pool, &list,
                            &splits},
                        stream);
                }
                mFinish.launch(tileRows, 1,
                    {&inputs[kLengths], &keys, &listed, &counts, &threshold, &indices, &batch, &query, &tile, &S, &C, &K, &pool, &splits},
                    stream);
            }
        }
    }

    int64_t mK{kMissing}, mSinks{0}, mWindow{0}, mPool{1};
    static constexpr std::array<Attribute, 4> kAttributes{{{"k", &IndexTopK::mK}, {"sinks", &IndexTopK::mSinks},
        {"window", &IndexTopK::mWindow}, {"pool", &IndexTopK::mPool}}};
    std::string mTimingCacheId;
    std::array<PluginField, kAttributes.size() + 1> mSaved{};
    PluginFieldCollection mFields{};
    Kernel mDecode, mPrefill, mGuess, mFilter, mFinish;
};

} // namespace

IPluginCreatorInterface* indexTopKCreator() noexcept
{
    static Creator<IndexTopK> creator;
    return &creator;
}

} // namespace dsa
