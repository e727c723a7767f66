// The thin layer over instruction sets. Each translation unit that includes it is compiled for one set,
// named by ATTNCAP_ISA, and sees two types: Lanes<float> and Lanes<double>.
//
//   V, I, M   vector of T, vector of integers of T's width, mask with one flag per lane
//   kWidth    lanes of a vector
//   kTileVectors x kTileKeys   vectors of rows times keys whose accumulators fit the registers
//   times_power   2^n (1 + y) for multiples n of 1 / kPowers, n kPowers being the low bits of the third argument, and 0
//                 in lanes not kept; from a table of kPowers entries, 0 where there is none
//   kTail         exp(r) - 1 is r (1 + r (kTail[0] + kTail[1] r)) to 3e-8 for |r| <= ln 2 / (2 kPowers)
//   max, min  give the second operand where either is NaN
//   above     a > b, or either is NaN
//   fma_kept  a b + c in lanes kept, else c, for finite a and any b
//   transpose    kWidth vectors as the rows of a square
//   sum_each     lane i of the result is the sum of vector i
//   gather, scatter   the number at each lane's place
//
// Arithmetic on V is the compiler's own vector arithmetic; what differs between sets stands below.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
// GCC 12 warns of its own header's deliberately uninitialised operands.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
struct Lanes;

#if defined(ATTNCAP_AVX512)

template <>
struct Lanes<float> {
    using T = float;
    using Int = int32_t;
    using V = __m512;
    using I = __m512i;
    using M = __mmask16;
    static constexpr int kWidth = 16, kTileVectors = 4, kTileKeys = 6, kPowers = 16;
    static constexpr T kTail[] = {0.5000162f, 0.16666718f};

    static V load(const T* p) { return _mm512_loadu_ps(p); }
    static void store(T* p, V v) { _mm512_storeu_ps(p, v); }
    static V all(T x) { return _mm512_set1_ps(x); }
    static I load_int(const Int* p) { return _mm512_loadu_si512(p); }
    static void store_int(Int* p, I v) { _mm512_storeu_si512(p, v); }
    static I all_int(Int x) { return _mm512_set1_epi32(x); }
    static V gather(const T* p, I places) { return _mm512_i32gather_ps(places, p, sizeof(T)); }
    static void scatter(T* p, I places, V v) { _mm512_i32scatter_ps(p, places, v, sizeof(T)); }
    static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static V max(V a, V b) { return _mm512_max_ps(a, b); }
    static V min(V a, V b) { return _mm512_min_ps(a, b); }
    static M less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
    static M less_equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
    static M above(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
    static V fma_kept(M kept, V a, V b, V c) { return _mm512_mask3_fmadd_ps(a, b, c, kept); }
    static M equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
    static M less_int(I a, I b) { return _mm512_cmplt_epi32_mask(a, b); }
    static M equal_int(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
    static M either(M a, M b) { return static_cast<M>(a | b); }
    static bool any(M m) { return m != 0; }
    static V select(M m, V a, V b) { return _mm512_mask_blend_ps(m, b, a); }
    static I select_int(M m, I a, I b) { return _mm512_mask_blend_epi32(m, b, a); }
    static V abs(V v) { return _mm512_abs_ps(v); }
    static V to_float(I v) { return _mm512_cvtepi32_ps(v); }
    static V times_power(V y, V n, I low, M kept) {
        const V table = _mm512_setr_ps(1.0f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                                       1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                                       1.68179286f, 1.75625217f, 1.8340081f, 1.91520655f);
        const V power = _mm512_permutexvar_ps(low, table);
        // Intel's processors take a hundred cycles over a result below all normal numbers.
        return _mm512_maskz_scalef_ps(kept, fma(power, y, power), n);
    }
    static I bits(V v) { return _mm512_castps_si512(v); }
    static V from_bits(I v) { return _mm512_castsi512_ps(v); }
    static T sum(V v) { return _mm512_reduce_add_ps(v); }
    static V sum_each(V (&a)[16]) {
        V b[8];
        for (int i = 0; i < 8; ++i) {  // in every quarter: two partial sums of two vectors, then one of four
            b[i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]) + _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
        }
        for (int i = 0; i < 4; ++i) {
            const __m512d low = _mm512_castps_pd(b[2 * i]), high = _mm512_castps_pd(b[2 * i + 1]);
            b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high)) + _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
        for (int i = 0; i < 2; ++i) {  // now the quarters are summed
            b[i] =
                _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd);
        }
        return _mm512_shuffle_f32x4(b[0], b[1], 0x88) + _mm512_shuffle_f32x4(b[0], b[1], 0xdd);
    }
    static void transpose(V (&a)[16]) {
        V b[16];
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            for (int j = 0; j < 2; ++j) {
                const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
                a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
                a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
            }
        }
        for (int i = 0; i < 16; i += 8) {  // 4x4 blocks are in place; their quarters move next
            for (int j = 0; j < 4; ++j) {
                b[i + j] = _mm512_shuffle_f32x4(a[i + j], a[i + j + 4], 0x88);
                b[i + j + 4] = _mm512_shuffle_f32x4(a[i + j], a[i + j + 4], 0xdd);
            }
        }
        for (int j = 0; j < 8; ++j) {
            a[j] = _mm512_shuffle_f32x4(b[j], b[j + 8], 0x88);
            a[j + 8] = _mm512_shuffle_f32x4(b[j], b[j + 8], 0xdd);
        }
    }
};

template <>
struct Lanes<double> {
    using T = double;
    using Int = int64_t;
    using V = __m512d;
    using I = __m512i;
    using M = __mmask8;
    static constexpr int kWidth = 8, kTileVectors = 4, kTileKeys = 6, kPowers = 0;

    static V load(const T* p) { return _mm512_loadu_pd(p); }
    static void store(T* p, V v) { _mm512_storeu_pd(p, v); }
    static V all(T x) { return _mm512_set1_pd(x); }
    static I load_int(const Int* p) { return _mm512_loadu_si512(p); }
    static void store_int(Int* p, I v) { _mm512_storeu_si512(p, v); }
    static I all_int(Int x) { return _mm512_set1_epi64(x); }
    static V gather(const T* p, I places) { return _mm512_i64gather_pd(places, p, sizeof(T)); }
    static void scatter(T* p, I places, V v) { _mm512_i64scatter_pd(p, places, v, sizeof(T)); }
    static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
    static V max(V a, V b) { return _mm512_max_pd(a, b); }
    static V min(V a, V b) { return _mm512_min_pd(a, b); }
    static M less(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
    static M less_equal(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
    static M above(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLE_UQ); }
    static V fma_kept(M kept, V a, V b, V c) { return _mm512_mask3_fmadd_pd(a, b, c, kept); }
    static M equal(V a, V b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
    static M less_int(I a, I b) { return _mm512_cmplt_epi64_mask(a, b); }
    static M equal_int(I a, I b) { return _mm512_cmpeq_epi64_mask(a, b); }
    static M either(M a, M b) { return static_cast<M>(a | b); }
    static bool any(M m) { return m != 0; }
    static V select(M m, V a, V b) { return _mm512_mask_blend_pd(m, b, a); }
    static I select_int(M m, I a, I b) { return _mm512_mask_blend_epi64(m, b, a); }
    static V abs(V v) { return _mm512_abs_pd(v); }
    static V to_float(I v) { return _mm512_cvtepi64_pd(v); }
    static I bits(V v) { return _mm512_castpd_si512(v); }
    static V from_bits(I v) { return _mm512_castsi512_pd(v); }
    static T sum(V v) { return _mm512_reduce_add_pd(v); }
    static void transpose(V (&a)[kWidth]) {
        T rows[kWidth][kWidth];
        for (int i = 0; i < kWidth; ++i) store(rows[i], a[i]);
        for (int i = 0; i < kWidth; ++i) {
            for (int j = 0; j < kWidth; ++j) a[i][j] = rows[j][i];
        }
    }
    static V sum_each(V (&a)[kWidth]) {
        transpose(a);
        V total = a[0];
        for (int i = 1; i < kWidth; ++i) total = total + a[i];
        return total;
    }
};

#else

// GCC and Clang vector extensions; with AVX2 flags they become ymm code, elsewhere SSE2 or NEON.
#if defined(ATTNCAP_AVX2)
constexpr int kVectorBytes = 32;
constexpr int kKeysPerTile = 6;
#else
constexpr int kVectorBytes = 16;
constexpr int kKeysPerTile = 4;
#endif

template <class Type, class Integer>
struct GenericLanes {
    using T = Type;
    using Int = Integer;
    typedef T V __attribute__((vector_size(kVectorBytes)));
    typedef Int I __attribute__((vector_size(kVectorBytes)));
    using M = I;  // -1 where true, 0 where false
    static constexpr int kWidth = kVectorBytes / sizeof(T), kTileVectors = 2, kTileKeys = kKeysPerTile;
    static constexpr int kPowers = 0;

    static V load(const T* p) {
        V v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }
    static V all(T x) { return x - V{}; }
    static I load_int(const Int* p) {
        I v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static void store_int(Int* p, I v) { std::memcpy(p, &v, sizeof v); }
    static I all_int(Int x) { return x - I{}; }
    static V gather(const T* p, I places) {
        V v;
        for (int lane = 0; lane < kWidth; ++lane) v[lane] = p[places[lane]];
        return v;
    }
    static void scatter(T* p, I places, V v) {
        for (int lane = 0; lane < kWidth; ++lane) p[places[lane]] = v[lane];
    }
    static M less(V a, V b) { return a < b; }
    static M less_equal(V a, V b) { return a <= b; }
    static M above(V a, V b) { return ~(a <= b); }
    static M equal(V a, V b) { return a == b; }
    static M less_int(I a, I b) { return a < b; }
    static M equal_int(I a, I b) { return a == b; }
    static M either(M a, M b) { return a | b; }
    static V select(M m, V a, V b) { return from_bits((m & bits(a)) | (~m & bits(b))); }
    static I select_int(M m, I a, I b) { return (m & a) | (~m & b); }
    static V to_float(I v) { return __builtin_convertvector(v, V); }
    static I bits(V v) {
        I i;
        std::memcpy(&i, &v, sizeof i);
        return i;
    }
    static V from_bits(I i) {
        V v;
        std::memcpy(&v, &i, sizeof v);
        return v;
    }
    static T sum(V v) {
        T total = 0;
        for (int lane = 0; lane < kWidth; ++lane) total += v[lane];
        return total;
    }
    static void transpose(V (&a)[kWidth]) {
        T rows[kWidth][kWidth];
        for (int i = 0; i < kWidth; ++i) store(rows[i], a[i]);
        for (int i = 0; i < kWidth; ++i) {
            for (int j = 0; j < kWidth; ++j) a[i][j] = rows[j][i];
        }
    }
    static V sum_each(V (&a)[kWidth]) {
        transpose(a);
        V total = a[0];
        for (int i = 1; i < kWidth; ++i) total = total + a[i];
        return total;
    }
};

template <>
struct Lanes<float> : GenericLanes<float, int32_t> {
#if defined(ATTNCAP_AVX2)
    static constexpr int kPowers = 8;
    static constexpr T kTail[] = {0.5000646f, 0.1666686f};
    static V times_power(V y, V, I low, M kept) {
        const V table = _mm256_setr_ps(1.0f, 1.09050775f, 1.18920708f, 1.29683959f, 1.41421354f, 1.54221082f,
                                       1.68179286f, 1.8340081f);
        typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));  // of a lane not kept they wrap around
        const auto fraction = (Bits)_mm256_permutevar8x32_ps(table, (__m256i)low);
        const V power = from_bits((I)(fraction + (((Bits)low & ~uint32_t(kPowers - 1)) << 20)));
        return from_bits(bits(fma(power, y, power)) & kept);
    }
    static V gather(const T* p, I places) { return _mm256_i32gather_ps(p, (__m256i)places, sizeof(T)); }
    static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static V fma_kept(M kept, V a, V b, V c) { return fma(a, from_bits(bits(b) & kept), c); }
    static V max(V a, V b) { return _mm256_max_ps(a, b); }
    static V min(V a, V b) { return _mm256_min_ps(a, b); }
    static bool any(M m) { return !_mm256_testz_si256((__m256i)m, (__m256i)m); }
    static V select(M m, V a, V b) { return _mm256_blendv_ps(b, a, (__m256)m); }
    static void transpose(V (&a)[8]) {
        V b[8];
        for (int i = 0; i < 8; i += 4) {  // rows i .. i + 3: columns c and c + 4 of them in the two halves
            const V low0 = _mm256_unpacklo_ps(a[i], a[i + 1]), high0 = _mm256_unpackhi_ps(a[i], a[i + 1]);
            const V low1 = _mm256_unpacklo_ps(a[i + 2], a[i + 3]), high1 = _mm256_unpackhi_ps(a[i + 2], a[i + 3]);
            b[i] = _mm256_shuffle_ps(low0, low1, 0x44), b[i + 1] = _mm256_shuffle_ps(low0, low1, 0xee);
            b[i + 2] = _mm256_shuffle_ps(high0, high1, 0x44), b[i + 3] = _mm256_shuffle_ps(high0, high1, 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            a[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
            a[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
        }
    }
    static V sum_each(V (&a)[8]) {
        const V low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
        const V high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
        return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
    }
#else
    static V fma(V a, V b, V c) { return a * b + c; }
    static V fma_kept(M kept, V a, V b, V c) { return fma(a, from_bits(bits(b) & kept), c); }
    static V max(V a, V b) { return select(b < a, a, b); }
    static V min(V a, V b) { return select(a < b, a, b); }
    static bool any(M m) {
        int64_t words[2];
        std::memcpy(words, &m, sizeof words);
        return (words[0] | words[1]) != 0;
    }
#endif
    static V abs(V v) { return from_bits(bits(v) & 0x7fffffff); }
};

template <>
struct Lanes<double> : GenericLanes<double, int64_t> {
#if defined(ATTNCAP_AVX2)
    static V gather(const T* p, I places) { return _mm256_i64gather_pd(p, (__m256i)places, sizeof(T)); }
    static V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
    static V fma_kept(M kept, V a, V b, V c) { return fma(a, from_bits(bits(b) & kept), c); }
    static V max(V a, V b) { return _mm256_max_pd(a, b); }
    static V min(V a, V b) { return _mm256_min_pd(a, b); }
    static bool any(M m) { return !_mm256_testz_si256((__m256i)m, (__m256i)m); }
    static V select(M m, V a, V b) { return _mm256_blendv_pd(b, a, (__m256d)m); }
#else
    static V fma(V a, V b, V c) { return a * b + c; }
    static V fma_kept(M kept, V a, V b, V c) { return fma(a, from_bits(bits(b) & kept), c); }
    static V max(V a, V b) { return select(b < a, a, b); }
    static V min(V a, V b) { return select(a < b, a, b); }
    static bool any(M m) { return (m[0] | m[1]) != 0; }
#endif
    static V abs(V v) { return from_bits(bits(v) & 0x7fffffffffffffff); }
};

#endif

// How a register tile multiplies: one number of T a word, or a pair of bfloat16 a word (float accumulators). Numbers of
// T are scaled once as queries, pairs, whose few digits that would cost, as sums.
template <class Type>
struct Plain {
    using T = Type;
    using L = Lanes<T>;
    using Word = T;
    static constexpr bool kScalesSums = false;
    using V = typename L::V;
    static V load(const Word* p) { return L::load(p); }
    static V all(Word x) { return L::all(x); }
    static V add_product(V a, V b, typename L::V sum) { return L::fma(a, b, sum); }
};

template <class Type>
struct Pairs;

#if defined(ATTNCAP_BF16)
template <>
struct Pairs<float> {
    using T = float;
    using L = Lanes<float>;
    using Word = uint32_t;
    static constexpr bool kScalesSums = true;
    using V = __m512i;
    static V load(const Word* p) { return _mm512_loadu_si512(p); }
    static V all(Word x) { return _mm512_set1_epi32(int32_t(x)); }
    static L::V add_product(V a, V b, L::V sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    // 32 bfloat16 in the order of the lanes, `first` rounded and then `second`.
    static void store_row(Word* p, L::V first, L::V second) {
        _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
    // Each word: `first` rounded to bfloat16 below, `second` above.
    static void store_rounded(Word* p, L::V first, L::V second) {
#if defined(ATTNCAP_AMX)
        // Twice as quick on processors with AMX as their own conversion. Of two numbers that are as near this takes the
        // one farther from 0 instead of the even one.
        const __m512i half = _mm512_set1_epi32(0x8000);
        const __m512i below = _mm512_srli_epi32(_mm512_add_epi32(L::bits(first), half), 16);
        const __m512i above = _mm512_add_epi32(L::bits(second), half);
        _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, below, above));
#else
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        lanes = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16));
        _mm512_storeu_si512(p, _mm512_permutexvar_epi16(lanes, halves));
#endif
    }
    // 32 words: a bfloat16 of `first` below, one of `second` above as far as `keep` has its bits.
    static void interleave(const char* first, const char* second, uint32_t keep, Word* p) {
        const __m512i below = _mm512_loadu_si512(first);
        const __m512i above = _mm512_and_si512(_mm512_loadu_si512(second), _mm512_set1_epi32(keep ? -1 : 0));
        __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        lanes = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(32)), 16));
        _mm512_storeu_si512(p, _mm512_permutex2var_epi16(below, lanes, above));
        lanes = _mm512_add_epi16(lanes, _mm512_set1_epi16(16));
        _mm512_storeu_si512(p + 16, _mm512_permutex2var_epi16(below, lanes, above));
    }
};
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace ATTNCAP_ISA
}  // namespace attncap
