// Compiled with -DDSA_ISA=<name> for each instruction set, into a namespace of its own.
#include "kernels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dsa::cpu::DSA_ISA
{
namespace
{

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRowsAtOnce = 4, kHeadsAtOnce = 6;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRowsAtOnce = 2, kHeadsAtOnce = 2;
#else
constexpr int kLanes = 4, kRowsAtOnce = 2, kHeadsAtOnce = 2;
#endif
constexpr int kVectors = 4;
constexpr int kTile = 64; // keys handled at a time: transposed, they fill a part of the first cache
constexpr int kScoresAtOnce = 32768; // of attention: 128 KB
static_assert(kTile % (kLanes * kVectors) == 0);

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

Floats& floats(float* p)
{
    return *reinterpret_cast<Floats*>(p);
}

Floats const& floats(float const* p)
{
    return *reinterpret_cast<Floats const*>(p);
}

/// Keeps a vector in a register: the compiler would load it anew for each product.
void hold(Floats& x)
{
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#endif
}

/// Memory of this thread, kept for the next call.
template <class T>
T* scratch(std::vector<T>& memory, int64_t size)
{
    if (static_cast<int64_t>(memory.size()) < size)
        memory.resize(size);
    return memory.data();
}

int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/// Fetches rows that are needed next, evenly over the steps of a computation: in turns, each would wait for the other.
///
/// Into the second cache: only few lines can be under way into the first, and a tile at work fills it.
class Fetch
{
public:
    /// `count` rows (none if it is negative) of so many bytes.
    Fetch(void const* const* rows, int64_t count, int64_t bytes, int64_t steps)
        : mRows(rows)
        , mEnd(mRows + std::max<int64_t>(count, 0))
        , mBytes(bytes)
        , mLinesPerStep(ceil_div((mEnd - mRows) * ceil_div(mBytes, kLine), steps))
    {
    }

    void step()
    {
        for (int64_t i = 0; i < mLinesPerStep && mRows < mEnd; ++i)
        {
            __builtin_prefetch(static_cast<char const*>(*mRows) + mAt, 0, 2);
            mAt += kLine;
            if (mAt >= mBytes)
                mAt = 0, ++mRows;
        }
    }

private:
    static constexpr int64_t kLine = 64;
    void const* const* mRows;
    void const* const* mEnd;
    int64_t mBytes, mLinesPerStep, mAt = 0;
};

/// A number in fp16 as fp32.
float widened(uint16_t half)
{
    uint32_t const sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 1023u;
    if (exponent == 0)
        return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
    return std::bit_cast<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
}

/// Element `at` of a row of fp32, or of fp16.
template <bool half>
float number(void const* row, int64_t at)
{
    return half ? widened(static_cast<uint16_t const*>(row)[at]) : static_cast<float const*>(row)[at];
}

/// kLanes of them.
template <bool half>
Floats numbers(void const* row, int64_t at)
{
    if constexpr (!half)
        return floats(static_cast<float const*>(row) + at);
    [[maybe_unused]] auto const* const place = static_cast<uint16_t const*>(row) + at;
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(place)));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(place)));
#else
    return Floats{widened(place[0]), widened(place[1]), widened(place[2]), widened(place[3])};
#endif
}

/// columns[w][t] = rows[t][w], words of 4 bytes or, with `half`, of fp16 as fp32; rows from `count` to kTile become zeros.
template <bool half = false>
void transpose(void const* const* rows, int64_t count, int64_t words, uint32_t* columns)
{
    int64_t w = 0;
#if defined(__AVX512F__)
    for (; w + 16 <= words; w += 16)
        for (int64_t first = 0; first < kTile; first += 16)
        {
            __m512i r[16], s[16];
            for (int i = 0; i < 16; ++i)
                r[i] = first + i < count ? (__m512i)numbers<half>(rows[first + i], w) : _mm512_setzero_si512();
            for (int i = 0; i < 16; i += 2)
            {
                s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
                s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
            }
            for (int i = 0; i < 16; i += 4)
            {
                r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
                r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
                r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
                r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
            }
            for (int i = 0; i < 4; ++i) // r[4 q + i]: words i, 4 + i, 8 + i, 12 + i of the rows 4 q … 4 q + 3
            {
                __m512i const a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xDD);
                __m512i const c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88),
                              d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xDD);
                uint32_t* out = columns + (w + i) * kTile + first;
                _mm512_storeu_si512(out, _mm512_shuffle_i32x4(a, c, 0x88));
                _mm512_storeu_si512(out + 4 * kTile, _mm512_shuffle_i32x4(b, d, 0x88));
                _mm512_storeu_si512(out + 8 * kTile, _mm512_shuffle_i32x4(a, c, 0xDD));
                _mm512_storeu_si512(out + 12 * kTile, _mm512_shuffle_i32x4(b, d, 0xDD));
            }
        }
#elif defined(__AVX2__)
    for (; w + 8 <= words; w += 8)
        for (int64_t first = 0; first < kTile; first += 8)
        {
            __m256 r[8], s[8];
            for (int i = 0; i < 8; ++i)
                r[i] = first + i < count ? (__m256)numbers<half>(rows[first + i], w) : _mm256_setzero_ps();
            for (int i = 0; i < 8; i += 2)
            {
                s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
                s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
            }
            for (int i = 0; i < 8; i += 4)
            {
                r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
                r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xEE);
                r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
                r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xEE);
            }
            for (int i = 0; i < 4; ++i) // r[4 h + i]: words i, 4 + i of the rows 4 h … 4 h + 3
            {
                float* out = reinterpret_cast<float*>(columns + (w + i) * kTile + first);
                _mm256_storeu_ps(out, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
                _mm256_storeu_ps(out + 4 * kTile, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
            }
        }
#endif
    for (; w < words; ++w)
        for (int64_t t = 0; t < kTile; ++t)
            columns[w * kTile + t] = t < count ? std::bit_cast<uint32_t>(number<half>(rows[t], w)) : 0;
}

/// acc + the products of four unsigned bytes of each lane of a and four signed ones of b.
Ints add_products(Ints acc, Ints a, Ints b)
{
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    __m512i const pairs = _mm512_maddubs_epi16((__m512i)a, (__m512i)b);
    return acc + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    __m256i const pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
    return acc + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int byte = 0; byte < 4; ++byte)
        acc += ((a >> 8 * byte) & 255) * ((b << (24 - 8 * byte)) >> 24);
    return acc;
#endif
}

/// Steps of a Fetch in the dots of so many rows with keys of so many words.
int64_t dot_steps(int64_t rows, int64_t words)
{
    return ceil_div(rows, kRowsAtOnce) * (kTile / (kLanes * kVectors)) * words;
}

/// dots[r * room + t] = rows[r] · keys[t] for n rows, of kTile keys that stand as columns.
template <int n>
void float_dots(float const* const* rows, float const* columns, int64_t D, float* dots, int64_t room, Fetch& ahead)
{
    Fetch fetch = ahead; // in registers
    float const* row[n];
    std::copy_n(rows, n, row);
    for (int first = 0; first < kTile; first += kLanes * kVectors)
    {
        Floats acc[n][kVectors] = {};
        for (int64_t d = 0; d < D; ++d)
        {
            fetch.step();
            Floats key[kVectors];
            for (int v = 0; v < kVectors; ++v)
                hold(key[v] = floats(columns + d * kTile + first + v * kLanes));
            for (int r = 0; r < n; ++r)
                for (int v = 0; v < kVectors; ++v)
                    acc[r][v] += key[v] * row[r][d];
        }
        for (int r = 0; r < n; ++r)
            for (int v = 0; v < kVectors; ++v)
                floats(dots + r * room + first + v * kLanes) = acc[r][v];
    }
    ahead = fetch;
}

/// The same for signed bytes and keys of unsigned ones, in a room of kTile; to the dots, start[r] is added.
template <int n>
void byte_dots(int8_t const* const* rows, int32_t const* start, uint32_t const* columns, int64_t words, float* dots,
    Fetch& ahead)
{
    for (int first = 0; first < kTile; first += kLanes * kVectors)
    {
        Ints acc[n][kVectors];
        for (int r = 0; r < n; ++r)
            for (int v = 0; v < kVectors; ++v)
                acc[r][v] = Ints{} + start[r];
        for (int64_t w = 0; w < words; ++w)
        {
            ahead.step();
            Ints key[kVectors];
            for (int v = 0; v < kVectors; ++v)
                key[v] = *reinterpret_cast<Ints const*>(columns + w * kTile + first + v * kLanes);
            for (int r = 0; r < n; ++r)
            {
                int32_t four;
                std::memcpy(&four, rows[r] + 4 * w, 4);
                for (int v = 0; v < kVectors; ++v)
                    acc[r][v] = add_products(acc[r][v], key[v], Ints{} + four);
            }
        }
        for (int r = 0; r < n; ++r)
            for (int v = 0; v < kVectors; ++v)
                floats(dots + r * kTile + first + v * kLanes) = __builtin_convertvector(acc[r][v], Floats);
    }
}

/// What the zero of unsigned keys, 128, takes from the dots of a head: the same for all keys.
int32_t zero_key_dot(int8_t const* row, int64_t Di)
{
    int32_t sum = 0;
    for (int64_t d = 0; d < Di; ++d)
        sum += row[d];
    return -128 * sum;
}

/// Scores of one query for a tile of keys, before their own scale: [kTile]. starts: zero_key_dot of its heads.
void score(
    IndexTopK const& call, int64_t query, int32_t const* starts, uint32_t const* columns, float* scores, Fetch& ahead)
{
    float dots[kRowsAtOnce * kTile];
    std::fill_n(scores, kTile, 0.0f);
    for (int64_t h = 0; h < call.Hi; h += kRowsAtOnce)
    {
        int const n = static_cast<int>(std::min<int64_t>(kRowsAtOnce, call.Hi - h));
        int64_t const at = (query * call.Hi + h) * call.Di;
        // Of fewer heads than fit, the last stands in for those that are missing: its dots are not read again.
        if (call.index_scale)
        {
            int8_t const* rows[kRowsAtOnce];
            int32_t start[kRowsAtOnce];
            for (int r = 0; r < kRowsAtOnce; ++r)
            {
                rows[r] = static_cast<int8_t const*>(call.index_q) + at + std::min(r, n - 1) * call.Di;
                start[r] = starts[h + std::min(r, n - 1)];
            }
            byte_dots<kRowsAtOnce>(rows, start, columns, call.Di / 4, dots, ahead);
        }
        else
        {
            float const* rows[kRowsAtOnce];
            for (int r = 0; r < kRowsAtOnce; ++r)
                rows[r] = static_cast<float const*>(call.index_q) + at + std::min(r, n - 1) * call.Di;
            float_dots<kRowsAtOnce>(rows, reinterpret_cast<float const*>(columns), call.Di, dots, kTile, ahead);
        }
        for (int r = 0; r < n; ++r)
        {
            float const weight = call.index_weights[query * call.Hi + h + r];
            for (int t = 0; t < kTile; t += kLanes)
            {
                Floats const dot = floats(dots + r * kTile + t);
                floats(scores + t) += weight * (dot < 0.0f ? Floats{} : dot); // of NaN, NaN
            }
        }
    }
}

/// Bit t: scores[t] is not at most `threshold`. Where either is NaN, it is not.
uint64_t above(float const* scores, float threshold)
{
    uint64_t mask = 0;
#if defined(__AVX512F__)
    for (int t = 0; t < kTile; t += 16)
        mask |= uint64_t(_mm512_cmp_ps_mask(_mm512_loadu_ps(scores + t), _mm512_set1_ps(threshold), _CMP_NLE_UQ)) << t;
#elif defined(__AVX2__)
    for (int t = 0; t < kTile; t += 8)
    {
        __m256 const more = _mm256_cmp_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(threshold), _CMP_NLE_UQ);
        mask |= uint64_t(_mm256_movemask_ps(more)) << t;
    }
#else
    for (int t = 0; t < kTile; ++t)
        mask |= uint64_t(!(scores[t] <= threshold)) << t;
#endif
    return mask;
}

/// A score and a group as one integer: the larger, the better. The lower group wins a tie; NaN ranks highest.
uint64_t ranked(float score, int64_t group)
{
    if (!(score <= std::numeric_limits<float>::max()))
        score = std::numeric_limits<float>::max();
    uint32_t const bits = std::bit_cast<uint32_t>(score + 0.0f); // -0 is 0
    uint32_t const order = bits & 0x80000000 ? ~bits : bits | 0x80000000;
    return uint64_t(order) << 32 | ~static_cast<uint32_t>(group);
}

float score_of(uint64_t candidate)
{
    uint32_t const order = candidate >> 32;
    return std::bit_cast<float>(order & 0x80000000 ? order & 0x7FFFFFFF : ~order);
}

int64_t group_of(uint64_t candidate)
{
    return static_cast<uint32_t>(~candidate);
}

/// Moves the `wanted` best of `count` candidates to the front; `rest` has room for all.
///
/// By bins of equal width between the least and the largest score: only within one bin are candidates compared.
void move_best_to_front(uint64_t* candidates, int64_t count, int64_t wanted, uint64_t* rest)
{
    constexpr int kBins = 256;
    float least = std::numeric_limits<float>::infinity(), largest = -least;
    for (int64_t i = 0; i < count; ++i)
    {
        float const score = score_of(candidates[i]);
        least = std::min(least, score);
        largest = std::max(largest, score);
    }
    float const bins_per_unit = (kBins - 1) / (largest - least);
    int64_t kept = 0, among = count;
    if (std::isnormal(bins_per_unit)) // else all are equal, or too far apart
    {
        auto bin_of = [=](uint64_t candidate) { return static_cast<int>((score_of(candidate) - least) * bins_per_unit); };
        int32_t sizes[kBins] = {};
        for (int64_t i = 0; i < count; ++i)
            ++sizes[bin_of(candidates[i])];
        int bin = kBins - 1;
        for (int64_t better = sizes[bin]; better < wanted; better += sizes[bin])
            --bin;
        among = 0;
        for (int64_t i = 0; i < count; ++i)
        {
            uint64_t const candidate = candidates[i];
            int const its = bin_of(candidate);
            candidates[kept] = candidate;
            rest[among] = candidate;
            kept += its > bin;
            among += its == bin;
        }
    }
    else
        std::copy_n(candidates, count, rest);
    int64_t const missing = wanted - kept;
    std::nth_element(rest, rest + missing - 1, rest + among, std::greater<uint64_t>());
    std::copy_n(rest, missing, candidates + kept);
}

/// The `wanted` best of what is added in the order of the groups, and some more until they are sorted out.
struct Best
{
    uint64_t* candidates;
    int64_t wanted, room, count;
    float threshold; // NaN, and all are taken, until `wanted` are there

    /// rest: room for all candidates.
    void sort_out(uint64_t* rest)
    {
        if (count < wanted || wanted == 0)
            return;
        if (count > wanted)
            move_best_to_front(candidates, count, wanted, rest);
        count = wanted;
        threshold = std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < wanted; ++i)
            threshold = std::min(threshold, score_of(candidates[i]));
    }
};

/// What a query sees: groups below `groups`, of which those from `first` to `stop` are ranked, the others selected.
struct Sight
{
    int64_t tokens, groups, first, stop, wanted;

    Sight(IndexTopK const& call, int64_t b, int64_t t)
    {
        int64_t const end = call.kv_lengths[b] - call.S + t + 1;
        tokens = std::clamp<int64_t>(end, 0, call.G * call.pool);
        groups = ceil_div(tokens, call.pool);
        int64_t const settled = std::clamp<int64_t>(end - call.window, 0, tokens); // tokens before the window
        first = std::min(ceil_div(call.sinks, call.pool), groups);
        stop = std::max(settled / call.pool, first);
        wanted = std::max<int64_t>(call.k / call.pool - first - (groups - stop), 0);
        if (tokens <= call.k) // everything is selected: nothing is ranked
            first = stop = groups;
        wanted = std::min(wanted, stop - first);
    }
};

/// e^x for x <= 0, by halves of ln 2 and the series.
Floats exp_negative(Floats x)
{
    Floats const lowest = Floats{} - 87.0f;
    x = x < lowest ? lowest : x;
    Floats const magic = Floats{} + 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    Floats const shifted = x * 1.44269504f + magic;
    Floats const n = shifted - magic;
    Floats const r = x - n * 0.693145752f - n * 1.42860677e-6f;
    Floats y = Floats{} + 1.0f / 5040;
    for (float const term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f})
        y = y * r + term;
    Floats const power = (Floats)((Words)y + ((Words)shifted << 23)); // of NaN, the sum overflows
    return x == x ? power : x; // NaN
}

/// sums[r][d] += weights[r][i] * rows[i][d] for n heads and `vectors` vectors of d, over `count` rows.
template <int n, int vectors, bool half>
void add_weighted(void const* const* rows, int64_t count, float const* const* weights, float* const* sums,
    int64_t first, Fetch& ahead)
{
    Fetch fetch = ahead; // in registers
    float const* weight[n];
    std::copy_n(weights, n, weight);
    Floats acc[n][vectors] = {}; // of these rows alone: sums of sums round less
    for (int64_t i = 0; i < count; ++i)
    {
        fetch.step();
        for (int v = 0; v < vectors; ++v)
        {
            Floats value = numbers<half>(rows[i], first + v * kLanes);
            hold(value);
            for (int r = 0; r < n; ++r)
                acc[r][v] += value * weight[r][i];
        }
    }
    ahead = fetch;
    for (int r = 0; r < n; ++r)
        for (int v = 0; v < vectors; ++v)
            floats(sums[r] + first + v * kLanes) += acc[r][v];
}

template <int n, bool half>
void add_weighted_rows(void const* const* rows, int64_t count, float const* const* weights, float* const* sums,
    int64_t D, Fetch& ahead)
{
    int64_t d = 0;
    for (; d + kLanes * kVectors <= D; d += kLanes * kVectors)
        add_weighted<n, kVectors, half>(rows, count, weights, sums, d, ahead);
    for (; d + kLanes <= D; d += kLanes)
        add_weighted<n, 1, half>(rows, count, weights, sums, d, ahead);
    for (; d < D; ++d)
        for (int r = 0; r < n; ++r)
        {
            float sum = 0;
            for (int64_t i = 0; i < count; ++i)
                sum += weights[r][i] * number<half>(rows[i], d);
            sums[r][d] += sum;
        }
}

void select(IndexTopK const& call, int64_t task)
{
    int64_t const slice = task % call.slices, block = task / call.slices % call.blocks;
    int64_t const b = task / call.slices / call.blocks;
    int64_t const t0 = block * kQueriesPerBlock, t1 = std::min(t0 + kQueriesPerBlock, call.S);
    int64_t const width = call.k / call.pool, room = 2 * width + kTile;
    thread_local std::vector<uint64_t> memory;
    thread_local std::vector<uint32_t> columns_memory;
    int64_t const words = call.index_scale ? call.Di / 4 : call.Di;
    uint64_t* const candidates = scratch(memory, (t1 - t0 + 1) * room);
    uint64_t* const rest = candidates + (t1 - t0) * room;
    uint32_t* const columns = scratch(columns_memory, words * kTile);

    std::vector<Sight> sights;
    std::vector<Best> bests;
    std::vector<int32_t> starts((t1 - t0) * call.Hi); // of keys in 8 bits
    for (size_t row = 0; call.index_scale && row < starts.size(); ++row)
    {
        int64_t const at = ((b * call.S + t0) * call.Hi + row) * call.Di;
        starts[row] = zero_key_dot(static_cast<int8_t const*>(call.index_q) + at, call.Di);
    }
    int64_t stop = 0;
    for (int64_t t = t0; t < t1; ++t)
    {
        sights.emplace_back(call, b, t);
        Best const none{candidates + (t - t0) * room, sights.back().wanted, room, 0, std::nanf("")};
        bests.push_back(none);
        if (sights.back().first < sights.back().stop)
            stop = std::max(stop, sights.back().stop);
    }

    int64_t const tiles = ceil_div(stop, kTile);
    auto const* keys = static_cast<uint32_t const*>(call.index_k) + b * call.G * words;
    for (int64_t tile = tiles * slice / call.slices; tile < tiles * (slice + 1) / call.slices; ++tile)
    {
        int64_t const first = tile * kTile, count = std::min<int64_t>(stop - first, kTile);
        void const* rows[2 * kTile];
        for (int64_t i = 0; i < std::min<int64_t>(stop - first, 2 * kTile); ++i)
            rows[i] = keys + (first + i) * words;
        transpose(rows, count, words, columns);
        Fetch ahead(rows + kTile, std::min<int64_t>(stop - first - kTile, kTile), 4 * words, dot_steps(call.Hi, words));
        for (int64_t t = t0; t < t1; ++t)
        {
            Sight const& sight = sights[t - t0];
            Best& best = bests[t - t0];
            int64_t const from = std::max(sight.first - first, int64_t(0)), to = std::min(sight.stop - first, count);
            if (from >= to || best.wanted == 0)
                continue;
            alignas(64) float scores[kTile];
            score(call, b * call.S + t, starts.data() + (t - t0) * call.Hi, columns, scores, ahead);
            if (call.index_scale)
                for (int64_t i = 0; i < count; ++i)
                    scores[i] *= call.index_scale[b * call.G + first + i];
            if (best.count + kTile > best.room)
                best.sort_out(rest);
            uint64_t chosen = above(scores, best.threshold) & (~uint64_t(0) << from);
            if (to < kTile)
                chosen &= (uint64_t(1) << to) - 1;
            for (; chosen; chosen &= chosen - 1)
            {
                int const i = std::countr_zero(chosen);
                best.candidates[best.count++] = ranked(scores[i], first + i);
            }
        }
    }
    for (int64_t t = t0; t < t1; ++t)
    {
        Best& best = bests[t - t0];
        best.sort_out(rest);
        int64_t const place = (b * call.S + t) * call.slices + slice;
        call.counts[place] = static_cast<int32_t>(best.count);
        std::copy_n(best.candidates, best.count, call.candidates + place * width);
    }
}

void finish(IndexTopK const& call, int64_t query)
{
    Sight const sight(call, query / call.S, query % call.S);
    int64_t const width = call.k / call.pool;
    int32_t* out = call.indices + query * call.k;
    int32_t* const end = out + call.k;
    auto emit = [&](int64_t group)
    {
        for (int64_t token = group * call.pool; token < std::min((group + 1) * call.pool, sight.tokens); ++token)
            *out++ = static_cast<int32_t>(token);
    };
    for (int64_t g = 0; g < sight.first; ++g)
        emit(g);
    thread_local std::vector<uint64_t> memory;
    memory.clear();
    for (int64_t slice = 0; slice < call.slices; ++slice)
    {
        int64_t const place = query * call.slices + slice;
        uint64_t const* candidates = call.candidates + place * width;
        memory.insert(memory.end(), candidates, candidates + call.counts[place]);
    }
    int64_t const count = static_cast<int64_t>(memory.size());
    memory.resize(2 * count);
    if (count > sight.wanted)
        move_best_to_front(memory.data(), count, sight.wanted, memory.data() + count);
    for (int64_t i = 0; i < std::min(count, sight.wanted); ++i)
        emit(group_of(memory[i]));
    for (int64_t g = sight.stop; g < sight.groups; ++g)
        emit(g);
    std::fill(out, end, -1);
}

/// float_dots for up to `most` rows.
template <int most>
void float_dots_of(
    int64_t n, float const* const* rows, float const* columns, int64_t D, float* dots, int64_t room, Fetch& ahead)
{
    if (n == most)
        return float_dots<most>(rows, columns, D, dots, room, ahead);
    if constexpr (most > 1)
        float_dots_of<most - 1>(n, rows, columns, D, dots, room, ahead);
}

/// add_weighted_rows for up to `most` heads.
template <int most, bool half>
void add_weighted_rows_of(int64_t n, void const* const* rows, int64_t count, float const* const* weights,
    float* const* sums, int64_t D, Fetch& ahead)
{
    if (n == most)
        return add_weighted_rows<most, half>(rows, count, weights, sums, D, ahead);
    if constexpr (most > 1)
        add_weighted_rows_of<most - 1, half>(n, rows, count, weights, sums, D, ahead);
}

/// The softmax of one query head over rows that come in spans.
struct Softmax
{
    static float constexpr kNone = std::numeric_limits<float>::lowest();

    float largest = kNone; // score so far; kNone after nothing but -infinity
    Floats weight{};       // sum of the weights, in lanes

    /// Makes weights of `count` scores, which stand in whole vectors. sums [D]: of the spans before, weighted alike.
    void add(float* scores, int64_t count, float* sums, int64_t D)
    {
        float* const end = scores + count;
        float* const last = scores + ceil_div(count, kLanes) * kLanes;
        std::fill(end, last, -std::numeric_limits<float>::infinity());
        Floats most = Floats{} + largest;
        for (float* at = scores; at < last; at += kLanes)
            most = floats(at) > most ? floats(at) : most;
        float const before = largest;
        for (int lane = 0; lane < kLanes; ++lane)
            largest = std::max(largest, most[lane]);
        if (largest > before)
        {
            float const share = std::exp(before - largest);
            weight *= share;
            for (int64_t d = 0; d < D; ++d)
                sums[d] *= share;
        }
        for (float* at = scores; at < last; at += kLanes)
            floats(at) = exp_negative(floats(at) - largest);
        std::fill(end, last, 0.0f);
        for (float* tile = scores; tile < last; tile += kTile)
        {
            Floats sum{}; // sums of sums round less
            for (float* at = tile; at < std::min(tile + kTile, last); at += kLanes)
                sum += floats(at);
            weight += sum;
        }
    }
};

/// Attention of a block of tokens to one part of their rows, for the query heads of one KV head.
///
/// Rows are taken in spans: scores of all heads, their softmax so far, sums of the values. Of a single token a span is
/// long; of many, its scores still fit into the second cache.
template <bool half>
class Attention
{
public:
    Attention(SparseAttention const& of, int64_t task)
        : call(of), part(task % call.parts), h(task / call.parts % call.Hkv)
    {
        int64_t const block = task / call.parts / call.Hkv % call.blocks;
        b = task / call.parts / call.Hkv / call.blocks;
        t0 = call.S * block / call.blocks;
        heads = (call.S * (block + 1) / call.blocks - t0) * G;
        int64_t const in_all = call.indices ? call.K : visible(token(heads - 1));
        begin = in_all * part / call.parts;
        list_rows(in_all * (part + 1) / call.parts);
        span = std::max<int64_t>(kScoresAtOnce / heads / kTile, 1) * kTile;
        scores = scratch(scores_memory, heads * span);
        columns = scratch(columns_memory, D * kTile);
        softmax = scratch(softmax_memory, heads);
        q = scratch(heads_memory, 2 * heads * D);
        sums = q + heads * D;
        std::fill_n(softmax, heads, Softmax{});
        std::fill_n(sums, heads * D, 0.0f);
        for (int64_t r = 0; r < heads; ++r)
        {
            float const* const row = call.q + place(r) * D;
            for (int64_t d = 0; d < D; ++d)
                q[r * D + d] = row[d] * call.scale;
        }
    }

    void run()
    {
        for (int64_t start = 0; start < count; start += span)
        {
            int64_t const stop = std::min(start + span, count);
            score(start, stop);
            for (int64_t r = 0; r < heads; ++r)
                if (int64_t const seen = seen_by(r, start, stop))
                    softmax[r].add(scores + r * span, seen, sums + r * D, D);
            add_values(start, stop);
        }
        for (int64_t r = 0; r < heads; ++r)
            write(r);
    }

private:
    SparseAttention const& call;
    int64_t const part, h, G = call.Hq / call.Hkv, D = call.D, row_bytes = D * (half ? 2 : 4);
    int64_t b, t0, begin, count = 0, span;
    int64_t heads; // number r is head r % G of the group, of token(r)
    void const **k_rows, **v_rows; // [count]
    float *q, *sums;               // [heads, D], q scaled
    float* scores;                 // [heads, span]
    uint32_t* columns;             // [D, kTile]
    Softmax* softmax;              // [heads]

    static inline thread_local std::vector<float> heads_memory, scores_memory;
    static inline thread_local std::vector<uint32_t> columns_memory;
    static inline thread_local std::vector<void const*> rows_memory;
    static inline thread_local std::vector<Softmax> softmax_memory;

    int64_t token(int64_t r) const { return t0 + r / G; }

    /// Of q and the output, the row of head r.
    int64_t place(int64_t r) const { return (b * call.Hq + h * G + r % G) * call.S + token(r); }

    int64_t visible(int64_t t) const
    {
        return std::clamp<int64_t>(call.kv_lengths[b] - call.S + t + 1, 0, call.C);
    }

    /// How many of the rows from `first` to `stop` head r sees.
    int64_t seen_by(int64_t r, int64_t first, int64_t stop) const
    {
        return (call.indices ? stop : std::clamp(visible(token(r)) - begin, first, stop)) - first;
    }

    void list_rows(int64_t end)
    {
        k_rows = scratch(rows_memory, 2 * (end - begin));
        v_rows = k_rows + (end - begin);
        int64_t const cache = (b * call.Hkv + h) * call.C;
        for (int64_t i = begin; i < end; ++i)
        {
            int64_t const slot = call.indices ? call.indices[(b * call.S + t0) * call.K + i] : i;
            if (slot < 0 || slot >= call.C)
                continue;
            k_rows[count] = static_cast<char const*>(call.k_cache) + (cache + slot) * row_bytes;
            v_rows[count++] = static_cast<char const*>(call.v_cache) + (cache + slot) * row_bytes;
        }
    }

    /// Of the rows that are needed next, a tile: `rows` from `first` to `stop`, or after these `others`.
    Fetch next(void const** rows, int64_t first, int64_t stop, void const** others, int64_t of_others, int64_t steps) const
    {
        bool const same = first < stop;
        int64_t const some = std::min<int64_t>(same ? stop - first : of_others, kTile);
        return {same ? rows + first : others, some, row_bytes, ceil_div(heads, kHeadsAtOnce) * steps};
    }

    /// work(r, n, seen) for heads r to r + n, up to kHeadsAtOnce that see as many rows of a tile, unless they see none.
    template <class Work>
    void in_groups(int64_t first, int64_t stop, Work work)
    {
        bool const all_alike = seen_by(0, first, stop) == stop - first; // else those of a token are
        for (int64_t r = 0, n; r < heads; r += n)
        {
            int64_t const left = all_alike ? heads - r : G - r % G;
            n = ceil_div(left, ceil_div(left, kHeadsAtOnce));
            if (int64_t const seen = seen_by(r, first, stop))
                work(r, n, seen);
        }
    }

    void score(int64_t start, int64_t stop)
    {
        for (int64_t first = start; first < stop; first += kTile)
        {
            int64_t const end = std::min<int64_t>(first + kTile, stop);
            transpose<half>(k_rows + first, end - first, D, columns);
            Fetch ahead = next(k_rows, end, stop, v_rows + start, stop - start, D);
            in_groups(first, end, [&](int64_t r, int64_t n, int64_t)
            {
                float const* rows[kHeadsAtOnce];
                for (int64_t i = 0; i < n; ++i)
                    rows[i] = q + (r + i) * D;
                float* const dots = scores + r * span + first - start;
                float_dots_of<kHeadsAtOnce>(n, rows, reinterpret_cast<float const*>(columns), D, dots, span, ahead);
            });
        }
    }

    void add_values(int64_t start, int64_t stop)
    {
        for (int64_t first = start; first < stop; first += kTile)
        {
            int64_t const end = std::min<int64_t>(first + kTile, stop);
            int64_t const steps = ceil_div(D, kLanes * kVectors) * (end - first);
            Fetch ahead = next(v_rows, end, stop, k_rows + stop, count - stop, steps);
            in_groups(first, end, [&](int64_t r, int64_t n, int64_t seen)
            {
                float const* weights[kHeadsAtOnce];
                float* to[kHeadsAtOnce];
                for (int64_t i = 0; i < n; ++i)
                {
                    weights[i] = scores + (r + i) * span + first - start;
                    to[i] = sums + (r + i) * D;
                }
                add_weighted_rows_of<kHeadsAtOnce, half>(n, v_rows + first, seen, weights, to, D, ahead);
            });
        }
    }

    /// Head r's output, or for merge_parts its sums, largest score and sum of weights.
    void write(int64_t r) const
    {
        float weight = 0;
        for (int lane = 0; lane < kLanes; ++lane)
            weight += softmax[r].weight[lane];
        bool const nothing = softmax[r].largest == Softmax::kNone; // but -infinity, or no row
        if (call.parts > 1)
        {
            int64_t const query = (b * call.S + token(r)) * call.Hkv + h;
            float* const out = call.partial + ((query * call.parts + part) * G + r % G) * (D + 2);
            std::copy_n(sums + r * D, D, out);
            out[D] = nothing ? -std::numeric_limits<float>::infinity() : softmax[r].largest;
            out[D + 1] = weight;
            return;
        }
        float* const out = call.output + place(r) * D;
        if (weight == 0) // no row
            std::fill_n(out, D, 0.0f);
        else // NaN for scores of -infinity alone, as in the definition
            for (int64_t d = 0; d < D; ++d)
                out[d] = sums[r * D + d] / (nothing ? std::nanf("") : weight);
    }
};

void attend(SparseAttention const& call, int64_t task)
{
    call.half ? Attention<true>(call, task).run() : Attention<false>(call, task).run();
}

void merge_parts(SparseAttention const& call, int64_t task)
{
    int64_t const h = task % call.Hkv, query = task / call.Hkv, b = query / call.S, t = query % call.S;
    int64_t const G = call.Hq / call.Hkv, D = call.D, width = D + 2;
    for (int64_t g = 0; g < G; ++g)
    {
        auto sums = [&](int64_t part) { return call.partial + ((task * call.parts + part) * G + g) * width; };
        float largest = -std::numeric_limits<float>::infinity(), weight = 0;
        for (int64_t part = 0; part < call.parts; ++part)
            largest = std::max(largest, sums(part)[D]);
        float* const out = call.output + ((b * call.Hq + h * G + g) * call.S + t) * D;
        std::fill_n(out, D, 0.0f);
        for (int64_t part = 0; part < call.parts; ++part)
        {
            if (sums(part)[D + 1] == 0) // a part without rows, or none of them counts
                continue;
            float const share = std::exp(sums(part)[D] - largest);
            weight += share * sums(part)[D + 1];
            for (int64_t d = 0; d < D; ++d)
                out[d] += share * sums(part)[d];
        }
        for (int64_t d = 0; weight != 0 && d < D; ++d)
            out[d] /= weight;
    }
}

void round_row(Rounding const& call, int64_t row)
{
    float const* const numbers = call.numbers + row * call.size;
    uint8_t* const bytes = call.bytes + row * call.size;
    float largest = 1e-12f; // LEAST of index_topk/rounding.py
    bool has_nan = false;
    for (int64_t i = 0; i < call.size; ++i)
    {
        largest = std::max(largest, std::fabs(numbers[i]));
        has_nan |= std::isnan(numbers[i]);
    }
    float const scale = has_nan ? std::nanf("") : largest / static_cast<float>(call.full);
    for (int64_t i = 0; i < call.size; ++i)
    {
        float const step = std::nearbyint(numbers[i] / scale);
        bytes[i] = std::isnan(step) ? 0 : static_cast<uint8_t>(static_cast<int32_t>(step) + call.zero);
    }
    call.scales[row] = call.weights ? call.weights[row] * scale : scale;
}

} // namespace

extern Kernels const kernels{select, finish, attend, merge_parts, round_row};

} // namespace dsa::cpu::DSA_ISA
