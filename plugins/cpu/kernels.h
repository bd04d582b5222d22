// The CPU kernels, compiled once for each instruction set; library.cpp calls those that the processor has.
#pragma once

#include <cstdint>

namespace dsa::cpu
{

/// dsa::IndexTopK, shapes as in index_topk/op.py. Of keys in 8 bits, 128 is zero; index_scale is given with them only.
struct IndexTopK
{
    int64_t B, S, Hi, Di, G;
    int64_t k, sinks, window, pool;
    void const* index_q;        // float, or int8 with keys in 8 bits
    float const* index_weights;
    void const* index_k;        // float or uint8
    int64_t const* kv_lengths;
    float const* index_scale;   // or null: keys are float
    int32_t* indices;

    // How the work is cut: `blocks` of queries for each row of the batch, and `slices` of the keys.
    int64_t blocks, slices;
    uint64_t* candidates;       // [B, S, slices, k / pool]
    int32_t* counts;            // [B, S, slices]
};

/// dsa::SparseAttention, shapes as in sparse_attention/op.py; without indices over every visible row, its dense twin.
struct SparseAttention
{
    int64_t B, Hq, Hkv, S, C, D, K;
    float scale;
    float const* q;
    bool half;                  // the caches are fp16, else fp32
    void const* k_cache;
    void const* v_cache;
    int32_t const* indices;     // or null, and kv_lengths [B] given: query t stands at kv_lengths - S + t
    int64_t const* kv_lengths;
    float* output;

    // How the work is cut: `blocks` of queries for each row of the batch, with indices of one query, and each block's rows
    // into `parts`; with more than one, they are merged by merge_parts.
    int64_t blocks, parts;
    float* partial;             // [B, S, Hkv, parts, G, D + 2]: weighted sums, largest score, sum of weights
};

/// dsa::RoundKeys and dsa::RoundQueries: rows of numbers as bytes, see index_topk/rounding.py.
struct Rounding
{
    int64_t rows, size;
    int32_t full, zero;         // the largest entry of a row becomes zero ± full
    float const* numbers;
    uint8_t* bytes;             // signed ones too, as their bits
    float* scales;              // [rows]
    float const* weights;       // or null: what the scales are multiplied by
};

struct Kernels
{
    /// Candidates of one task: of B · blocks · slices.
    void (*select)(IndexTopK const&, int64_t task);
    /// Indices of one query out of B · S, from its candidates.
    void (*finish)(IndexTopK const&, int64_t query);
    /// One part of the rows of a block of queries for one KV head: of B · blocks · Hkv · parts.
    void (*attend)(SparseAttention const&, int64_t task);
    /// Output of one query for one KV head, from its parts: of B · S · Hkv.
    void (*merge_parts)(SparseAttention const&, int64_t task);
    void (*round_row)(Rounding const&, int64_t row);
};

constexpr int64_t kQueriesPerBlock = 16;

} // namespace dsa::cpu
