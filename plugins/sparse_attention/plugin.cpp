// dsa::SparseAttention as a TensorRT plugin: checks and launches; the mathematics is in kernel.py, the contract in op.py.
#include "constants.h"
#include "plugin.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>

namespace dsa
{
namespace
{

using namespace nvinfer1;
namespace size = sparse_attention; // generated from kernel.py

// Positions of the inputs and of the output behind them.
enum Tensor : int32_t
{
    kQ,       // [B, Hq, S, D]  fp16 | bf16
    kKeys,    // [B, Hkv, C, D] same type
    kValues,  // [B, Hkv, C, D] same type
    kIndices, // [B, S, K]      int32
    kOutput,  // [B, Hq, S, D]  same type as q
    kInputs = kOutput,
};

struct Shape
{
    int64_t B, Hq, Hkv, S, C, D, K;
};

// `bounds`: these are upper bounds, which may differ between tensors that have B, S or C in common.
Shape shapeOf(Dims const& q, Dims const& keys, Dims const& values, Dims const& indices, bool bounds)
{
    auto const same = [bounds](int64_t one, int64_t other) { return bounds || one == other; };
    require(q.nbDims == 4, "q must be [B, Hq, S, D], got " + text(q));
    require(keys.nbDims == 4, "k_cache must be [B, Hkv, C, D], got " + text(keys));
    require(indices.nbDims == 3, "indices must be [B, S, K], got " + text(indices));
    Shape const shape{q.d[0], q.d[1], keys.d[1], q.d[2], keys.d[2], q.d[3], indices.d[2]};
    bool const sameCaches = values.nbDims == 4 && same(values.d[0], keys.d[0]) && values.d[1] == keys.d[1]
        && same(values.d[2], keys.d[2]) && values.d[3] == keys.d[3];
    require(sameCaches && same(keys.d[0], shape.B) && keys.d[3] == shape.D && same(indices.d[0], shape.B)
            && same(indices.d[1], shape.S),
        "q " + text(q) + ", k_cache " + text(keys) + ", v_cache " + text(values) + " and indices " + text(indices)
            + " do not fit together");
    require(shape.D == 64 || shape.D == 128 || shape.D == 576,
        "the head size D must be 64, 128 or 576, got " + std::to_string(shape.D));
    require(shape.Hkv >= 1 && shape.Hq % shape.Hkv == 0 && shape.Hq / shape.Hkv >= 1 && shape.Hq / shape.Hkv <= size::MAX_GROUP,
        "query heads per KV head must be 1 to " + std::to_string(size::MAX_GROUP) + ", got " + std::to_string(shape.Hq) + " / "
            + std::to_string(shape.Hkv));
    require(shape.K >= 1 && shape.K <= size::MAX_K,
        "indices per token K must be 1 to " + std::to_string(size::MAX_K) + ", got " + std::to_string(shape.K));
    require(shape.C >= 0 && shape.C <= size::MAX_CAPACITY,
        "the cache capacity C must be at most " + std::to_string(size::MAX_CAPACITY) + ", got " + std::to_string(shape.C));
    require(shape.B * shape.S <= size::MAX_TOKENS,
        "query tokens of a call B * S must be at most " + std::to_string(size::MAX_TOKENS) + ", got " + std::to_string(shape.B * shape.S));
    return shape;
}

class SparseAttention final : public Plugin<SparseAttention>
{
public:
    static constexpr char const* kName = "SparseAttention";

    static PluginFieldCollection const& attributeFields()
    {
        static PluginField const fields[] = {{"scale", nullptr, PluginFieldType::kFLOAT32, 1},
            {"plugin_version", nullptr, PluginFieldType::kCHAR, 1}, {"plugin_namespace", nullptr, PluginFieldType::kCHAR, 1}};
        static PluginFieldCollection const collection{3, fields};
        return collection;
    }

    explicit SparseAttention(PluginFieldCollection const& fields)
    {
        bool found = false;
        for (int32_t i = 0; i < fields.nbFields; ++i)
        {
            PluginField const& field = fields.fields[i];
            if (field.name != nullptr && std::strcmp(field.name, "scale") == 0)
            {
                mScale = static_cast<float>(numberOf(field));
                found = true;
            }
            else
            {
                checkCommonAttribute(field);
            }
        }
        require(found, "attribute scale is missing");
        require(std::isfinite(mScale) && mScale > 0.0F,
            "attribute scale must be positive and finite, got " + std::to_string(mScale));
        std::snprintf(mTimingCacheId.data(), mTimingCacheId.size(), "scale=%.9g", static_cast<double>(mScale));
    }

    bool supportsFormatCombination(
        int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept override
    {
        if (nbInputs != kInputs || nbOutputs != 1 || pos < 0 || pos > kOutput
            || inOut[pos].desc.format != TensorFormat::kLINEAR)
        {
            return false;
        }
        DataType const type = inOut[pos].desc.type;
        if (pos == kQ && type == DataType::kFLOAT)
        {
            // TensorRT itself only says that no format fits.
            log(ILogger::Severity::kWARNING, std::string("dsa::") + kName + ": q must be fp16 or bf16, not fp32");
        }
        switch (pos)
        {
        case kQ: return isHalfOrBfloat(type);
        case kIndices: return type == DataType::kINT32;
        default: return type == inOut[kQ].desc.type;
        }
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*,
        int32_t nbOutputs) noexcept override
    {
        return guarded(kName, -1, [&] {
            require(nbInputs == kInputs && nbOutputs == 1, "4 inputs and 1 output are needed");
            kernelType(in[kQ].desc.type);
            shapeOf(in[kQ].max, in[kKeys].max, in[kValues].max, in[kIndices].max, true);
            Dims const& q = in[kQ].desc.dims;
            Dims const& keys = in[kKeys].desc.dims;
            require(q.d[1] > 0 && q.d[3] > 0 && keys.d[1] > 0,
                "Hq, Hkv and D must be fixed in the network, q is " + text(q) + ", k_cache " + text(keys));
            return 0;
        });
    }

    int32_t getOutputDataTypes(
        DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept override
    {
        return guarded(kName, -1, [&] {
            require(nbInputs == kInputs && nbOutputs == 1, "4 inputs and 1 output are needed");
            outputTypes[0] = inputTypes[kQ];
            return 0;
        });
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs,
        int32_t nbOutputs, IExprBuilder&) noexcept override
    {
        return guarded(kName, -1, [&] {
            require(nbInputs == kInputs && nbOutputs == 1, "4 inputs and 1 output are needed");
            require(inputs[kQ].nbDims == 4, "q must be [B, Hq, S, D]");
            outputs[0] = inputs[kQ];
            return 0;
        });
    }

    // Of the largest shapes of the profile; see `largest_workspace` in kernel.py.
    std::size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*,
        int32_t) const noexcept override
    {
        return guarded<std::size_t>(kName, 0, [&] {
            require(nbInputs == kInputs, "4 inputs are needed");
            Shape const most = shapeOf(in[kQ].max, in[kKeys].max, in[kValues].max, in[kIndices].max, true);
            int64_t const rows
                = std::min(most.B * most.S * size::MAX_SPLITS, std::max<int64_t>(programsOf(most) / gathersOf(most), 1));
            return static_cast<std::size_t>(4 * rows * most.Hq * (most.D + 2));
        });
    }

    char const* getTimingCacheID() noexcept override
    {
        return mTimingCacheId.data();
    }

    // Loads the kernels. TensorRT calls this within enqueueV3 when a shape or an address has changed: a call before a CUDA
    // graph is captured loads them, within the capture nothing can be.
    int32_t onShapeChange(
        PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*, int32_t nbOutputs) noexcept override
    {
        return guarded(kName, -1, [&] {
            require(nbInputs == kInputs && nbOutputs == 1, "4 inputs and 1 output are needed");
            Shape const shape = shapeOf(in[kQ].dims, in[kKeys].dims, in[kValues].dims, in[kIndices].dims, false);
            std::string const form = std::string(kernelType(in[kQ].type)) + "_" + std::to_string(shape.D);
            mAttend = Kernel("sparse_attention_attend_" + form);
            mCombine = Kernel("sparse_attention_combine_" + form);
            return 0;
        });
    }

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        return guarded(kName, -1, [&] {
            Shape const shape = shapeOf(in[kQ].dims, in[kKeys].dims, in[kValues].dims, in[kIndices].dims, false);
            if (shape.B * shape.S == 0)
            {
                return 0;
            }
            static constexpr std::array<char const*, kInputs> kNames{"q", "k_cache", "v_cache", "indices"};
            for (int32_t i = 0; i < kInputs; ++i)
            {
                requireAligned(inputs[i], kNames[i]);
            }
            requireAligned(outputs[0], "the output");
            requireAligned(workspace, "the workspace");
            launch(shape, inputs, outputs[0], static_cast<float*>(workspace), stream);
            return 0;
        });
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        mSaved = {{{"scale", &mScale, PluginFieldType::kFLOAT32, 1}, layoutField()}};
        mFields = {static_cast<int32_t>(mSaved.size()), mSaved.data()};
        return &mFields;
    }

private:
    static int64_t programsOf(Shape const& shape)
    {
        return size::ATTEND_PROGRAMS * 64 / shape.D;
    }

    // Programs per token and share of K.
    static int64_t gathersOf(Shape const& shape)
    {
        return shape.Hkv * ceilDiv(shape.Hq / shape.Hkv, int64_t{size::GROUP_PADDED});
    }

    void launch(Shape const& shape, void const* const* inputs, void* output, float* workspace, cudaStream_t stream) const
    {
        // The same numbers as `plan` in kernel.py.
        int64_t const tokens64 = shape.B * shape.S;
        int64_t const wanted = std::min<int64_t>(
            std::max<int64_t>(programsOf(shape) / (tokens64 * gathersOf(shape)), 1), size::MAX_SPLITS);
        int64_t const block = shape.D <= size::LONG_ROW ? size::BLOCK_K * shape.D / 64 : size::WIDE_BLOCK_K;
        int64_t const share64 = ceilDiv(ceilDiv(shape.K, wanted), block) * block;
        int64_t const splits64 = ceilDiv(shape.K, share64);

        float* sums = workspace;
        float* statistics = sums + (splits64 > 1 ? tokens64 * shape.Hq * splits64 * shape.D : 0);
        int32_t const tokens = static_cast<int32_t>(tokens64), S = static_cast<int32_t>(shape.S);
        int32_t const C = static_cast<int32_t>(shape.C), K = static_cast<int32_t>(shape.K);
        int32_t const queryHeads = static_cast<int32_t>(shape.Hq), heads = static_cast<int32_t>(shape.Hkv);
        int32_t const group = queryHeads / heads, share = static_cast<int32_t>(share64);
        int32_t const splits = static_cast<int32_t>(splits64);
        mAttend.launch(static_cast<unsigned>(tokens64 * gathersOf(shape) * splits64), 1,
            {&inputs[kQ], &inputs[kKeys], &inputs[kValues], &inputs[kIndices], &output, &sums, &statistics, &mScale, &tokens,
                &S, &C, &heads, &group, &K, &share, &splits},
            stream);
        if (splits > 1)
        {
            mCombine.launch(static_cast<unsigned>(tokens64 * shape.Hq * ceilDiv(shape.D, int64_t{size::CHUNK})), 1,
                {&sums, &statistics, &output, &tokens, &S, &queryHeads, &splits}, stream);
        }
    }

    float mScale{0.0F};
    std::array<char, 32> mTimingCacheId{};
    std::array<PluginField, 2> mSaved{};
    PluginFieldCollection mFields{};
    Kernel mAttend, mCombine;
};

} // namespace

IPluginCreatorInterface* sparseAttentionCreator() noexcept
{
    static Creator<SparseAttention> creator;
    return &creator;
}

} // namespace dsa
