/* Linear layers on packed few-bit weights, and the block Hadamard transform, for a CPU.

   A weight is (code - 2^(b-1) + 1/2) * step, codes lie packed as a little-endian bit stream along
   each row (see packing.py). Nothing is unpacked in memory: a vector of 32 bytes holds 32 * 8/b
   codes, shifted and masked to one code a byte, and meets activations that were put into the same
   order before. Activations are integers: codes of eight bits at most, or floats as fixed-point
   numbers of 24 bits (32 where one value stands out) relative to the largest of their row, split
   into signed bytes. Products are then summed exactly, so results depend on no order and no number
   of threads; the rounding of a row of floats to 24 bits is what float32 arithmetic loses as well.

   Plain C with GCC's vector extensions; the two multiplications have AVX2 forms. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define API __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define WIDTH 32      /* bytes of a vector */
#define LINE 64      /* bytes of a cache line, which no vector should straddle */
#define BLOCK 8       /* rows that one thread takes at once */
#define MOST_LIMBS 4  /* bytes of a fixed-point activation */
#define NOT_FINITE 1
#define NO_MEMORY 2

typedef uint8_t u8x32 __attribute__((vector_size(WIDTH)));
typedef uint16_t u16x16 __attribute__((vector_size(WIDTH)));
typedef int16_t s16x16 __attribute__((vector_size(WIDTH)));
typedef int32_t s32x8 __attribute__((vector_size(WIDTH)));
typedef uint32_t u32x8 __attribute__((vector_size(WIDTH)));
typedef float f32x8 __attribute__((vector_size(WIDTH)));

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long parts_of(long count, long size) { return (count + size - 1) / size; }

INLINE u8x32 load(const void *from) {
    u8x32 value;
    memcpy(&value, from, WIDTH);
    return value;
}

/* Products of codes (at most 15) and signed bytes, neighbours summed. */
INLINE s16x16 pairs(u8x32 codes, u8x32 bytes) {
#ifdef __AVX2__
    return (s16x16)_mm256_maddubs_epi16((__m256i)codes, (__m256i)bytes);
#else
    s16x16 even = ((s16x16)bytes << 8) >> 8, odd = (s16x16)bytes >> 8;
    return (s16x16)((u16x16)codes & 255) * even + (s16x16)((u16x16)codes >> 8) * odd;
#endif
}

/* Neighbours summed. */
INLINE s32x8 widen(s16x16 value) {
#ifdef __AVX2__
    return (s32x8)_mm256_madd_epi16((__m256i)value, _mm256_set1_epi16(1));
#else
    return (((s32x8)value << 16) >> 16) + ((s32x8)value >> 16);
#endif
}

/* Keeps a sum in its register: GCC would put all products first, and then has no room for them. */
#ifdef __AVX2__
#define SETTLE(sum) __asm__("" : "+x"(sum))
#else
#define SETTLE(sum)
#endif

/* Bytes of sums joined: the lanes of each, times 256^limb. No sum leaves 32 bits: rows hold at most
   2^20 codes. */
INLINE int64_t joined(const s32x8 *wide, const int limbs) {
    int32_t sums[MOST_LIMBS];
#ifdef __AVX2__
    const __m256i none = _mm256_setzero_si256();
    __m256i low = _mm256_hadd_epi32((__m256i)wide[0], limbs > 1 ? (__m256i)wide[1] : none);
    __m256i high = limbs > 2 ? _mm256_hadd_epi32((__m256i)wide[2], (__m256i)wide[3]) : none;
    __m256i both = _mm256_hadd_epi32(low, high);
    _mm_storeu_si128(
        (__m128i *)sums,
        _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1))
    );
#else
    for (int limb = 0; limb < limbs; limb++) {
        sums[limb] = 0;
        for (int i = 0; i < 8; i++) sums[limb] += wide[limb][i];
    }
#endif
    int64_t total = 0;
    for (int limb = 0; limb < limbs; limb++) total += sums[limb] * (1LL << (8 * limb));
    return total;
}

/* ---- two rows times one token --------------------------------------------------------- */

/* Two rows at once read each activation once. */
INLINE void add_products(
    u8x32 first, u8x32 second, const int8_t *x, s16x16 near[2][MOST_LIMBS], const int bits,
    const int limbs
) {
    const uint8_t mask = (uint8_t)((1 << bits) - 1);
#pragma GCC unroll 8
    for (int part = 0; part < 8 / bits; part++) {
        u8x32 one = (u8x32)((u16x16)first >> (bits * part)) & mask;
        u8x32 two = (u8x32)((u16x16)second >> (bits * part)) & mask;
#pragma GCC unroll 4
        for (int limb = 0; limb < limbs; limb++) {
            u8x32 bytes = load(x + (part * limbs + limb) * WIDTH);
            near[0][limb] += pairs(one, bytes);
            SETTLE(near[0][limb]);
            near[1][limb] += pairs(two, bytes);
            SETTLE(near[1][limb]);
        }
    }
}

/* sum of code * activation over `bytes` of each row; `x` is laid out by `spread`. */
INLINE void dot(
    const uint8_t *first, const uint8_t *second, long bytes, const int8_t *x, const int bits,
    const int limbs, int64_t totals[2]
) {
    const int every = bits == 4 ? 4 : 8; /* vectors whose sums fit into 16 bits */
    const int stride = 8 / bits * limbs * WIDTH;
    s32x8 wide[2][MOST_LIMBS] = {0};
    long whole = bytes / WIDTH;
    for (long i = 0; i < whole;) {
        s16x16 near[2][MOST_LIMBS] = {0};
        long stop = least(i + every, whole);
        for (; i < stop; i++, x += stride)
            add_products(load(first + i * WIDTH), load(second + i * WIDTH), x, near, bits, limbs);
        for (int limb = 0; limb < limbs; limb++) {
            wide[0][limb] += widen(near[0][limb]);
            wide[1][limb] += widen(near[1][limb]);
        }
    }
    if (bytes % WIDTH) { /* do not read past the row */
        uint8_t last[2][WIDTH] = {0};
        s16x16 near[2][MOST_LIMBS] = {0};
        memcpy(last[0], first + whole * WIDTH, bytes % WIDTH);
        memcpy(last[1], second + whole * WIDTH, bytes % WIDTH);
        add_products(load(last[0]), load(last[1]), x, near, bits, limbs);
        for (int limb = 0; limb < limbs; limb++) {
            wide[0][limb] += widen(near[0][limb]);
            wide[1][limb] += widen(near[1][limb]);
        }
    }
    totals[0] = joined(wide[0], limbs);
    totals[1] = joined(wide[1], limbs);
}

static void dot_of(
    const uint8_t *first, const uint8_t *second, long bytes, const int8_t *x, int bits, int limbs,
    int64_t totals[2]
) {
    switch (8 * bits + limbs) {
    case 8 + 1: dot(first, second, bytes, x, 1, 1, totals); break;
    case 8 + 2: dot(first, second, bytes, x, 1, 2, totals); break;
    case 8 + 3: dot(first, second, bytes, x, 1, 3, totals); break;
    case 8 + 4: dot(first, second, bytes, x, 1, 4, totals); break;
    case 16 + 1: dot(first, second, bytes, x, 2, 1, totals); break;
    case 16 + 2: dot(first, second, bytes, x, 2, 2, totals); break;
    case 16 + 3: dot(first, second, bytes, x, 2, 3, totals); break;
    case 16 + 4: dot(first, second, bytes, x, 2, 4, totals); break;
    case 32 + 1: dot(first, second, bytes, x, 4, 1, totals); break;
    case 32 + 2: dot(first, second, bytes, x, 4, 2, totals); break;
    case 32 + 3: dot(first, second, bytes, x, 4, 3, totals); break;
    default: dot(first, second, bytes, x, 4, 4, totals); break;
    }
}

/* ---- one row times one token ---------------------------------------------------------- */

/* sum of (code - 128) * activation, the latter within +-255. */
static int64_t dot_bytes(const uint8_t *row, const int16_t *x, long size) {
    int64_t total = 0;
    for (long from = 0; from < size; from += 32768) {
        int32_t part = 0;
        long end = least(from + 32768, size);
        for (long k = from; k < end; k++) part += (int16_t)(int8_t)(row[k] ^ 128) * x[k];
        total += part;
    }
    return total;
}

/* Levels of eight codes of eight bits. */
INLINE f32x8 levels_of(const uint8_t *codes) {
#ifdef __AVX2__
    __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
    return (f32x8)_mm256_cvtepi32_ps(wide) - 127.5f;
#else
    f32x8 found;
    for (int i = 0; i < 8; i++) found[i] = (float)codes[i] - 127.5f;
    return found;
#endif
}

/* sum of (code - 127.5) * activation, floats. */
static float dot_floats(const uint8_t *row, const float *x, long size) {
    f32x8 sums[4] = {0};
    long k = 0;
    for (; k + 32 <= size; k += 32) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            f32x8 values;
            memcpy(&values, x + k + 8 * i, sizeof values);
            sums[i] += levels_of(row + k + 8 * i) * values;
        }
    }
    f32x8 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0;
    for (int i = 0; i < 8; i++) total += sum[i];
    for (; k < size; k++) total += ((float)row[k] - 127.5f) * x[k];
    return total;
}

/* Bits that differ among the first `size`. */
static long differing(const uint8_t *a, const uint8_t *b, long size) {
    long count = 0, bytes = size / 8, i = 0;
#ifdef __AVX2__
    const __m256i ones = _mm256_setr_epi8( /* bits of a number below 16 */
        0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3,
        3, 4);
    const __m256i low = _mm256_set1_epi8(15), none = _mm256_setzero_si256();
    __m256i total = none;
    while (i + WIDTH <= bytes) {
        long stop = least(i + 31 * WIDTH, bytes - WIDTH + 1); /* 31 * 8 fit into a byte */
        __m256i near = none;
        for (; i < stop; i += WIDTH) {
            __m256i found = (__m256i)(load(a + i) ^ load(b + i));
            __m256i first = _mm256_shuffle_epi8(ones, _mm256_and_si256(found, low));
            __m256i second =
                _mm256_shuffle_epi8(ones, _mm256_and_si256(_mm256_srli_epi16(found, 4), low));
            near = _mm256_add_epi8(near, _mm256_add_epi8(first, second));
        }
        total = _mm256_add_epi64(total, _mm256_sad_epu8(near, none));
    }
    for (int lane = 0; lane < 4; lane++) count += (long)((long long *)&total)[lane];
#endif
    for (; i + 8 <= bytes; i += 8) {
        uint64_t left, right;
        memcpy(&left, a + i, 8);
        memcpy(&right, b + i, 8);
        count += __builtin_popcountll(left ^ right);
    }
    for (; i < bytes; i++) count += __builtin_popcount(a[i] ^ b[i]);
    if (size % 8) count += __builtin_popcount((a[i] ^ b[i]) & ((1 << (size % 8)) - 1));
    return count;
}

/* ---- packed rows and their groups ----------------------------------------------------- */

/* How rows of `size` codes divide into segments, one step each. */
typedef struct {
    long size, segments, length; /* codes a row, steps a row, codes a segment */
    int bits, field;             /* as stored, and as multiplied: three bits become four */
    long row, bytes, panel;      /* bytes of a stored row, a segment, a segment's activations */
} layout;

static layout layout_of(long size, int bits, long group) {
    layout l = {.size = size, .bits = bits, .field = bits == 3 ? 4 : bits};
    l.length = group && group < size ? group : size;
    l.segments = size ? parts_of(size, l.length) : 1;
    l.row = parts_of(size * bits, 8);
    l.bytes = parts_of(l.length * l.field, 8);
    l.panel = parts_of(l.bytes, WIDTH) * WIDTH * (8 / l.field);
    return l;
}

/* Three-bit codes to four-bit fields. */
static void expand(const uint8_t *from, long size, uint8_t *to) {
    long bytes = parts_of(3 * size, 8), i = 0, o = 0;
    for (; i + 8 <= bytes; i += 6, o += 8) {
        uint64_t word, fields = 0;
        memcpy(&word, from + i, 8);
#ifdef __BMI2__
        fields = _pdep_u64(word, 0x7777777777777777u);
#else
        for (int j = 0; j < 16; j++) fields |= (word >> (3 * j) & 7) << (4 * j);
#endif
        memcpy(to + o, &fields, 8);
    }
    for (long k = 2 * o; k < size; k++) {
        long bit = 3 * k;
        int code = from[bit / 8] >> (bit % 8);
        if (bit % 8 > 5) code |= from[bit / 8 + 1] << (8 - bit % 8);
        if (k % 2 == 0) to[k / 2] = 0;
        to[k / 2] |= (uint8_t)((code & 7) << (k % 2 * 4));
    }
}

/* Integers of one row, in the order in which `dot` meets them, and their sum per segment. */
INLINE void spread_by(
    const int32_t *values, const layout *l, const int limbs, int8_t *to, int64_t *sums
) {
    const int parts = 8 / l->field;
    memset(to, 0, l->segments * l->panel * limbs);
    for (long s = 0; s < l->segments; s++, to += l->panel * limbs) {
        const int32_t *from = values + s * l->length;
        long count = least(l->length, l->size - s * l->length);
        int64_t sum = 0;
        for (long k = 0, byte = 0; k < count; byte++) {
            int8_t *at = to + byte / WIDTH * parts * limbs * WIDTH + byte % WIDTH;
            for (int part = 0; part < parts && k < count; part++, k++) {
                uint32_t value = (uint32_t)from[k] + 0x80808080u; /* 128 in every byte */
                sum += from[k];
#pragma GCC unroll 4
                for (int limb = 0; limb < limbs; limb++, at += WIDTH, value >>= 8)
                    *at = (int8_t)(value ^ 128);
            }
        }
        sums[s] = sum;
    }
}

static void spread(
    const int32_t *values, const layout *l, int limbs, int8_t *to, int64_t *sums
) {
    switch (limbs) {
    case 1: spread_by(values, l, 1, to, sums); break;
    case 2: spread_by(values, l, 2, to, sums); break;
    case 3: spread_by(values, l, 3, to, sums); break;
    default: spread_by(values, l, 4, to, sums); break;
    }
}

/* Signs of codes as bits: 1 where not negative. */
static void sign_bits(const int8_t *codes, long size, uint8_t *to) {
    long k = 0;
    for (; k + 8 <= size; k += 8) {
        uint64_t word;
        memcpy(&word, codes + k, 8);
        to[k / 8] = (uint8_t)(((~word & 0x8080808080808080u) * 0x0002040810204081u) >> 56);
    }
    for (; k < size; k++) to[k / 8] |= (uint8_t)((codes[k] >= 0) << (k % 8));
}

/* Largest magnitude; infinite for a row that holds anything not finite. */
static float largest(const float *x, long size) {
    uint32_t most = 0;
    for (long k = 0; k < size; k++) {
        uint32_t bits;
        memcpy(&bits, x + k, 4);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    if (most >= 0x7f800000u) most = 0x7f800000u;
    float found;
    memcpy(&found, &most, 4);
    return found;
}

/* Bytes a fixed-point value needs for an error below 1e-6 of the row's norm: three, or four. */
static int limbs_for(const float *x, long size, float most) {
    double power = 0, bound = 16.0;
#pragma omp simd reduction(+ : power)
    for (long k = 0; k < size; k++) power += (double)x[k] * x[k];
    return (double)most * most * (double)size <= bound * bound * power ? 3 : 4;
}

/* Row to fixed point; the value of one unit. */
static double fix(const float *x, long size, float most, int limbs, int32_t *to) {
    double top = limbs == 3 ? 8355711.0 : 2139062143.0; /* 127 in every byte */
    double inverse = most > 0 ? top / most : 0;
    for (long k = 0; k < size; k++) to[k] = (int32_t)rint(x[k] * inverse);
    return most > 0 ? most / top : 0;
}

/* ---- tokens --------------------------------------------------------------------------- */

typedef struct {
    layout l;
    long tokens, rows;
    int limbs;        /* bytes per activation */
    int8_t *panels;   /* [tokens, segments, panel * limbs], see `spread` */
    int64_t *sums;    /* [tokens, segments], of the integers */
    double *units;    /* [tokens], the value of one */
    /* instead of panels: */
    const float *x;   /* floats by eight-bit weights; */
    int16_t *a;       /* codes by eight-bit weights: [tokens, size]; */
    uint8_t *signs;   /* one bit by one bit: [tokens, row] */
    const uint8_t *codes;
    const float *step, *bias;
    float *y;
} job;

/* One segment of two rows by one token: the products in units of the weights' steps. */
INLINE void segment(
    const job *j, const uint8_t *first, const uint8_t *second, long token, long s, double found[2]
) {
    const layout *l = &j->l;
    long from = s * l->length, count = least(l->length, l->size - from);
    long at = token * l->segments + s, skip = from * l->field / 8, levels = (1 << l->bits) - 1;
    int64_t products[2];
    first += skip;
    second += skip;
    if (j->x) {
        const float *x = j->x + token * l->size + from;
        found[0] = dot_floats(first, x, count);
        found[1] = dot_floats(second, x, count);
        return;
    }
    if (j->signs) {
        const uint8_t *signs = j->signs + token * l->row + from / 8;
        products[0] = count - 2 * differing(first, signs, count);
        products[1] = count - 2 * differing(second, signs, count);
        levels = 0;
    } else if (j->a) {
        const int16_t *a = j->a + token * l->size + from;
        products[0] = 2 * dot_bytes(first, a, count);
        products[1] = 2 * dot_bytes(second, a, count);
        levels = -1; /* those weights are signed already */
    } else {
        const int8_t *panel = j->panels + at * l->panel * j->limbs;
        long bytes = parts_of(count * l->field, 8);
        dot_of(first, second, bytes, panel, l->field, j->limbs, products);
        products[0] *= 2;
        products[1] *= 2;
    }
    for (int i = 0; i < 2; i++)
        found[i] = (double)(products[i] - levels * j->sums[at]) / 2 * j->units[token];
}

static void run_block(const job *j, long start, uint8_t *scratch) {
    const layout *l = &j->l;
    long end = least(start + BLOCK, j->rows), width = l->row;
    const uint8_t *rows = j->codes + start * width;
    if (l->bits == 3) {
        width = parts_of(l->size, 2);
        for (long n = start; n < end; n++)
            expand(j->codes + n * l->row, l->size, scratch + (n - start) * width);
        rows = scratch;
    }
    for (long token = 0; token < j->tokens; token++)
        for (long n = start; n < end; n += 2) {
            long other = n + 1 < end ? n + 1 : n; /* an odd row is its own neighbour */
            const float *one = j->step + n * l->segments, *two = j->step + other * l->segments;
            double total[2] = {j->bias ? j->bias[n] : 0, j->bias ? j->bias[other] : 0}, found[2];
            for (long s = 0; s < l->segments; s++) {
                segment(j, rows + (n - start) * width, rows + (other - start) * width, token, s,
                        found);
                total[0] += found[0] * one[s];
                total[1] += found[1] * two[s];
            }
            j->y[token * j->rows + n] = (float)total[0];
            j->y[token * j->rows + other] = (float)total[1];
        }
}

static int run(const job *j, int threads) {
    long blocks = parts_of(j->rows, BLOCK), room = BLOCK * parts_of(j->l.size, 2);
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        uint8_t *scratch = j->l.bits == 3 ? malloc(room ? room : 1) : NULL;
        failed = j->l.bits == 3 && !scratch;
#pragma omp for schedule(static)
        for (long b = 0; b < blocks; b++)
            if (j->l.bits != 3 || scratch) run_block(j, b * BLOCK, scratch);
        free(scratch);
    }
    return failed ? NO_MEMORY : 0;
}

static int reserve(job *j) {
    long cells = j->tokens * j->l.segments;
    j->sums = calloc(cells + 1, sizeof *j->sums);
    j->units = calloc(j->tokens + 1, sizeof *j->units);
    j->panels = aligned_alloc(LINE, parts_of(cells * j->l.panel * j->limbs + 1, LINE) * LINE);
    return !j->sums || !j->units || !j->panels;
}

static void release(job *j) {
    free(j->sums);
    free(j->units);
    free(j->panels);
    free(j->signs);
}

/* y[t,n] = sum_k x[t,k] * weight[n,k] + bias[n]. */
API int resplice_linear(
    const float *x, long tokens, long size, const uint8_t *codes, long rows, int bits,
    const float *step, long group, const float *bias, float *y, int threads
) {
    job j = {.l = layout_of(size, bits, group), .tokens = tokens, .rows = rows, .codes = codes,
             .step = step, .bias = bias, .y = y, .limbs = 3};
    float *most = malloc((tokens + 1) * sizeof *most);
    int32_t *fixed = malloc((size + 1) * sizeof *fixed);
    int failed = most && fixed ? 0 : NO_MEMORY;
    for (long t = 0; t < tokens && !failed; t++) {
        most[t] = largest(x + t * size, size);
        if (isinf(most[t])) failed = NOT_FINITE;
        else if (bits < 8 && limbs_for(x + t * size, size, most[t]) == 4) j.limbs = 4;
    }
    if (!failed && reserve(&j)) failed = NO_MEMORY;
    for (long t = 0; t < tokens && !failed; t++) {
        if (bits == 8) continue;
        j.units[t] = fix(x + t * size, size, most[t], j.limbs, fixed);
        spread(fixed, &j.l, j.limbs, j.panels + t * j.l.segments * j.l.panel * j.limbs,
               j.sums + t * j.l.segments);
    }
    if (bits == 8) j.x = x;
    if (!failed) failed = run(&j, threads);
    free(most);
    free(fixed);
    release(&j);
    return failed;
}

/* The same with activations (a + 1/2) * x_step[t] of x_bits bits, a in signed bytes.
   The integers multiplied are 2a + 1, of half a step each. */
API int resplice_code_linear(
    const int8_t *a, const float *x_step, int x_bits, long tokens, long size,
    const uint8_t *codes, long rows, int bits, const float *step, long group, const float *bias,
    float *y, int threads
) {
    job j = {.l = layout_of(size, bits, group), .tokens = tokens, .rows = rows, .codes = codes,
             .step = step, .bias = bias, .y = y, .limbs = x_bits == 8 || bits == 8 ? 2 : 1};
    int32_t *odd = malloc((size + 1) * sizeof *odd);
    int failed = !odd || reserve(&j) ? NO_MEMORY : 0;
    if (bits == 8) j.a = (int16_t *)j.panels;
    if (bits == 1 && x_bits == 1) {
        j.signs = calloc(tokens * j.l.row + 1, 1);
        if (!j.signs) failed = NO_MEMORY;
    }
    for (long t = 0; t < tokens && !failed; t++) {
        const int8_t *row = a + t * size;
        int64_t *sums = j.sums + t * j.l.segments;
        j.units[t] = x_step[t] / 2.0;
        if (j.signs) {
            sign_bits(row, size, j.signs + t * j.l.row);
            continue;
        }
        for (long k = 0; k < size; k++) odd[k] = 2 * row[k] + 1;
        if (!j.a) {
            spread(odd, &j.l, j.limbs, j.panels + t * j.l.segments * j.l.panel * j.limbs, sums);
            continue;
        }
        for (long k = 0; k < size; k++) {
            j.a[t * size + k] = (int16_t)odd[k];
            sums[k / j.l.length] += odd[k];
        }
    }
    if (!failed) failed = run(&j, threads);
    free(odd);
    release(&j);
    return failed;
}

/* Codes of one segment as floats. */
INLINE void unpack_by(
    const uint8_t *codes, long count, const int field, float middle, float unit, float *to
) {
    const u32x8 places = {0, field, 2 * field, 3 * field, 4 * field, 5 * field, 6 * field,
                          7 * field};
    const uint32_t mask = (1u << field) - 1;
    long k = 0;
    for (; k + 8 <= count; k += 8, codes += field) { /* eight codes take `field` bytes */
        uint32_t word = 0;
        memcpy(&word, codes, field);
        u32x8 one = (u32x8){word, word, word, word, word, word, word, word} >> places & mask;
        f32x8 found = (__builtin_convertvector((s32x8)one, f32x8) - middle) * unit;
        memcpy(to + k, &found, sizeof found);
    }
    for (int i = 0; k < count; k++, i += field)
        to[k] = ((float)(codes[i / 8] >> (i % 8) & mask) - middle) * unit;
}

static void unpack(
    const uint8_t *codes, long count, int field, float middle, float unit, float *to
) {
    switch (field) {
    case 1: unpack_by(codes, count, 1, middle, unit, to); return;
    case 2: unpack_by(codes, count, 2, middle, unit, to); return;
    case 4: unpack_by(codes, count, 4, middle, unit, to); return;
    default: break;
    }
    long k = 0;
    for (; k + 8 <= count; k += 8) {
        f32x8 found = levels_of(codes + k) * unit;
        memcpy(to + k, &found, sizeof found);
    }
    for (; k < count; k++) to[k] = ((float)codes[k] - middle) * unit;
}

/* Rows of weights as floats [rows, size]. */
API int resplice_dequantize(
    const uint8_t *codes, long rows, long size, int bits, const float *step, long group,
    float *to, int threads
) {
    layout l = layout_of(size, bits, group);
    const float middle = (float)((1 << bits) - 1) / 2;
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        uint8_t *scratch = bits == 3 ? malloc(parts_of(size, 2) + 1) : NULL;
        failed = bits == 3 && !scratch;
#pragma omp for schedule(static)
        for (long n = 0; n < rows; n++) {
            const uint8_t *row = codes + n * l.row;
            if (bits == 3) {
                if (!scratch) continue;
                expand(row, size, scratch);
                row = scratch;
            }
            for (long s = 0; s < l.segments; s++) {
                long from = s * l.length, count = least(l.length, size - from);
                unpack(row + from * l.field / 8, count, l.field, middle,
                       step[n * l.segments + s], to + n * size + from);
            }
        }
        free(scratch);
    }
    return failed ? NO_MEMORY : 0;
}

/* ---- the Hadamard transform ----------------------------------------------------------- */

#ifdef __clang__
#define SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
typedef int32_t index8 __attribute__((vector_size(WIDTH)));
#define SHUFFLE(v, ...) __builtin_shuffle(v, (index8){__VA_ARGS__})
#endif

/* Order 8 within a vector. */
INLINE f32x8 turn_eight(f32x8 v) {
    const f32x8 one = {1, -1, 1, -1, 1, -1, 1, -1}, two = {1, 1, -1, -1, 1, 1, -1, -1};
    const f32x8 four = {1, 1, 1, 1, -1, -1, -1, -1};
    v = SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6) + v * one;
    v = SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5) + v * two;
    return SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3) + v * four;
}

/* One block in place, not scaled. */
static void turn(float *x, long block) {
    for (long half = 1; half < least(block, 8) && block < 8; half *= 2)
        for (long i = 0; i < block; i += 2 * half)
            for (long k = i; k < i + half; k++) {
                float a = x[k], b = x[k + half];
                x[k] = a + b;
                x[k + half] = a - b;
            }
    if (block < 8) return;
    for (long i = 0; i < block; i += 8) {
        f32x8 v;
        memcpy(&v, x + i, sizeof v);
        v = turn_eight(v);
        memcpy(x + i, &v, sizeof v);
    }
    for (long half = 8; half < block; half *= 2)
        for (long i = 0; i < block; i += 2 * half)
            for (long k = i; k < i + half; k += 8) {
                f32x8 a, b, sum, difference;
                memcpy(&a, x + k, sizeof a);
                memcpy(&b, x + k + half, sizeof b);
                sum = a + b;
                difference = a - b;
                memcpy(x + k, &sum, sizeof a);
                memcpy(x + k + half, &difference, sizeof b);
            }
}

static void turn_row(const float *x, long size, long block, float *y) {
    float scale = (float)(1 / sqrt((double)block));
    for (long k = 0; k < size; k++) y[k] = x[k] * scale;
    for (long k = 0; k < size; k += block) turn(y + k, block);
}

/* Every block of every row of x[rows, size] transformed, orthonormally. */
API void resplice_hadamard(
    const float *x, long rows, long size, long block, float *y, int threads
) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long r = 0; r < rows; r++) turn_row(x + r * size, size, block, y + r * size);
}

/* Rows transformed and rounded to the grid of 2^bits levels; alpha is its clip over the rms. */
API int resplice_quest_codes(
    const float *x, long rows, long size, int bits, long block, double alpha, double tiny,
    int8_t *codes, float *step, int threads
) {
    int failed = 0;
    const float half = (float)(1 << (bits - 1));
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        float *turned = malloc((size + 1) * sizeof *turned);
        failed = !turned;
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            if (!turned) continue;
            double power = 0;
            if (block > 1) turn_row(x + r * size, size, block, turned);
            else memcpy(turned, x + r * size, size * sizeof *turned);
#pragma omp simd reduction(+ : power)
            for (long k = 0; k < size; k++) power += (double)turned[k] * turned[k];
            double found = 2 * (alpha * sqrt(power / (double)size) + tiny) / ((1 << bits) - 1);
            float unit = step[r] = (float)found;
            for (long k = 0; k < size; k++) {
                float level = rintf(turned[k] / unit + 0.5f); /* ties to even, zero goes down */
                level = level < 1 - half ? 1 - half : level > half ? half : level;
                codes[r * size + k] = (int8_t)(level - 1);
            }
        }
        free(turned);
    }
    return failed ? NO_MEMORY : 0;
}
