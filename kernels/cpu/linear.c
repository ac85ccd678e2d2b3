/* Linear layers on packed few-bit weights, for a CPU.

   A weight is (code - 2^(b-1) + 1/2) * step. For few tokens nothing is unpacked in memory: a vector
   of codes is shifted and masked to one code a byte, and meets activations that were put into the
   same order before (see panels.h). For more tokens the codes of ROWS rows are spread to bytes once.
   Products are summed exactly, so results depend on no order and no number of threads; the rounding
   of a row of floats to 24 bits is what float32 arithmetic loses as well. */

#include "panels.h"
#include "signs.h"

#define LINE 64            /* bytes of a cache line, which no vector should straddle */
#define CHUNK (512L << 10) /* bytes of panels that stay in the cache while rows pass by */
#define BLOCK 32           /* rows whose sums become results together */

typedef struct {
    layout l;
    long tokens, rows, columns;
    int limbs;        /* columns of a token */
    int ones;         /* columns are a where the integers are 2a + 1: codes are summed as well */
    int8_t *panels;   /* see panels.h */
    int64_t *sums;    /* [tokens, segments], of the integers */
    double *units;    /* [tokens], the value of one */
    uint8_t *signs;   /* one bit by one bit, instead of panels: [tokens, row] */
    const uint8_t *codes;
    const float *step, *bias;
    float *y;
} job;

/* What one thread needs: of ROWS rows the codes, of a block the sums. */
typedef struct {
    uint8_t *bytes; /* codes of one segment, one a byte */
    int32_t *found; /* [columns, BLOCK], products of one segment */
    int32_t code_sums[BLOCK];
    double *total;  /* [tokens, BLOCK] */
} workspace;

/* Sums of one run: of products with narrow codes, or with wide ones. */
typedef struct {
    narrow_sum near[ROWS][COLUMNS];
    s32s wide[ROWS][COLUMNS];
} sums;

/* One vector of each row times `count` columns; adds the codes to `ones`, if there. */
INLINE void multiply(
    const u8s fields[ROWS], const int8_t *x, sums *sum, s32s *ones, const int bits, const int wide,
    const int height, const int count
) {
    u8s all[ROWS] = {0};
#pragma GCC unroll 8
    for (int part = 0; part < 8 / bits; part++) {
        u8s codes[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < height; r++) {
            codes[r] = part_of(fields[r], bits, part);
            if (ones) all[r] += codes[r];
        }
#pragma GCC unroll 4
        for (int c = 0; c < count; c++) {
            u8s bytes = load(x + (part * count + c) * WIDTH);
            SETTLE(bytes);
#pragma GCC unroll 4
            for (int r = 0; r < height; r++) {
                if (wide) {
                    sum->wide[r][c] = add_wide(sum->wide[r][c], codes[r], bytes);
                    SETTLE(sum->wide[r][c]);
                } else {
                    sum->near[r][c] = add_narrow(sum->near[r][c], codes[r], bytes);
                    SETTLE(sum->near[r][c]);
                }
            }
        }
    }
    if (ones)
        for (int r = 0; r < height; r++) ones[r] = add_codes(ones[r], all[r]);
}

/* Sums of code * byte over `bytes` of each of `height` rows, for one panel of `count` columns; and of
   the codes alone. Narrow sums are widened after `every` vectors. */
INLINE void tile(
    const uint8_t *const rows[ROWS], long bytes, const int8_t *x, int32_t *found,
    int32_t *code_sums, long every, const int bits, const int wide, const int height,
    const int count, const int ones
) {
    const long whole = bytes / STORED(bits);
    const long stride = 8 / bits * count * WIDTH;
    s32s total[COLUMNS][ROWS] = {0}, codes[ROWS] = {0};
    int32_t signs[ROWS] = {0};
    u8s fields[ROWS];
    s32s *summed = ones && bits > 1 ? codes : NULL;
    for (long i = 0; i * STORED(bits) < bytes;) {
        sums sum = {0};
        for (long stop = least(i + every, whole); i < stop; i++, x += stride) {
#pragma GCC unroll 4
            for (int r = 0; r < height; r++) {
                fields[r] = load_fields(rows[r] + i * STORED(bits), bits);
                if (bits < 8 || wide) /* else unpacked before */
                    __builtin_prefetch(rows[r] + i * STORED(bits) + AHEAD, 0, 2);
                if (ones && bits == 1) signs[r] += bits_of(rows[r] + i * STORED(1));
            }
            multiply(fields, x, &sum, summed, bits, wide, height, count);
        }
        if (i == whole && i * STORED(bits) < bytes) { /* do not read past the row */
            for (int r = 0; r < height; r++) {
                const long at = i * STORED(bits);
                fields[r] = load_last(rows[r] + at, bytes - at, bits);
                if (ones && bits == 1) signs[r] += bits_of(&fields[r]);
            }
            multiply(fields, x, &sum, summed, bits, wide, height, count);
            i++;
        }
        for (int r = 0; r < height; r++)
            for (int c = 0; c < count; c++)
                total[c][r] += wide ? sum.wide[r][c] : widened(sum.near[r][c]);
    }
    for (int c = 0; c < count; c++) sum_lanes(total[c], found + c * BLOCK, height);
    if (ones && bits > 1) sum_lanes(codes, code_sums, height);
    if (ones && bits == 1)
        for (int r = 0; r < height; r++) code_sums[r] = signs[r];
}

INLINE void tiles(
    const uint8_t *const rows[ROWS], long bytes, const int8_t *x, int32_t *found,
    int32_t *code_sums, long every, const int bits, const int wide, const int ones, const int count
) {
    const int height = ALL_ROWS(count, ones) ? ROWS : ROWS / 2;
    for (int r = 0; r < ROWS; r += height)
        tile(rows + r, bytes, x, found + r, ones ? code_sums + r : NULL, every, bits, wide, height,
             count, ones);
}

INLINE void tile_by(
    const uint8_t *const rows[ROWS], long bytes, const int8_t *x, int32_t *found,
    int32_t *code_sums, long every, const int bits, const int wide, const int ones, long count
) {
    switch (count) {
    case 1: tiles(rows, bytes, x, found, code_sums, every, bits, wide, ones, 1); break;
    case 2: tiles(rows, bytes, x, found, code_sums, every, bits, wide, ones, 2); break;
    case 3: tiles(rows, bytes, x, found, code_sums, every, bits, wide, ones, 3); break;
    default: tiles(rows, bytes, x, found, code_sums, every, bits, wide, ones, 4); break;
    }
}

INLINE void tile_for(
    const uint8_t *const rows[ROWS], long bytes, const int8_t *x, int32_t *found,
    int32_t *code_sums, long every, const int bits, const int wide, long count
) {
    if (code_sums) tile_by(rows, bytes, x, found, code_sums, every, bits, wide, 1, count);
    else tile_by(rows, bytes, x, found, NULL, every, bits, wide, 0, count);
}

static void tile_of(
    const uint8_t *const rows[ROWS], long bytes, const int8_t *x, int32_t *found,
    int32_t *code_sums, long every, int bits, int wide, long count
) {
    switch (bits) {
    case 1: tile_for(rows, bytes, x, found, code_sums, every, 1, 0, count); break;
    case 2: tile_for(rows, bytes, x, found, code_sums, every, 2, 0, count); break;
    case 3: tile_for(rows, bytes, x, found, code_sums, every, 3, 0, count); break;
    case 4: tile_for(rows, bytes, x, found, code_sums, every, 4, 0, count); break;
    default:
        if (wide) tile_for(rows, bytes, x, found, code_sums, every, 8, 1, count);
        else tile_for(rows, bytes, x, found, code_sums, every, 8, 0, count);
    }
}

/* Products of a segment of ROWS rows with all columns, as rows `at` and on of their block. */
static void products(
    const job *j, const uint8_t *const rows[ROWS], long s, long at, workspace *w
) {
    const layout *l = &j->l;
    long from = s * l->length, count = least(l->length, l->size - from);
    long bytes = parts_of(count * l->bits, 8), groups = parts_of(j->columns, COLUMNS);
    const uint8_t *start[ROWS];
    for (int r = 0; r < ROWS; r++) start[r] = rows[r] + from * l->bits / 8;
    if (j->signs) {
        for (long t = 0; t < j->tokens; t++)
            for (int r = 0; r < ROWS; r++)
                w->found[t * BLOCK + at + r] = (int32_t)(
                    count - 2 * differing(start[r], j->signs + t * l->row + from / 8, count));
        return;
    }
    const int wide = l->bits == 8;
    int bits = l->bits;
    if (groups > 2 && !wide) {
        for (int r = 0; r < ROWS; r++) {
            to_bytes(start[r], bytes, bits, w->bytes + r * l->panel);
            start[r] = w->bytes + r * l->panel;
        }
        bytes = parts_of(count, WIDTH * l->parts) * WIDTH * l->parts;
        bits = 8;
    }
    const long every = wide ? bytes : LONGEST_RUN((1 << l->bits) - 1) / (8 / bits);
    for (long g = 0; g < groups; g++) {
        long width = least(COLUMNS, j->columns - g * COLUMNS);
        const int8_t *x = j->panels + (g * COLUMNS * l->segments + s * width) * l->panel;
        int32_t *found = w->found + g * COLUMNS * BLOCK + at;
        int32_t *code_sums = j->ones && g == 0 ? w->code_sums + at : NULL;
        tile_of(start, bytes, x, found, code_sums, every, bits, wide, width);
    }
}

/* Adds a segment's products of a block, in units of the weights' steps, to the totals. */
static void gather(const job *j, const float step[BLOCK], long s, const workspace *w) {
    const double levels = (1 << j->l.bits) - 1, half = j->signs ? 0.5 : 1;
    for (long t = 0; t < j->tokens; t++) {
        const int32_t *found = w->found + t * j->limbs * BLOCK;
        const double unit = j->units[t], sum = levels * (double)j->sums[t * j->l.segments + s] / 2;
        double product[BLOCK];
        for (int r = 0; r < BLOCK; r++) product[r] = found[(j->limbs - 1) * BLOCK + r];
        for (int limb = j->limbs - 2; limb >= 0; limb--)
            for (int r = 0; r < BLOCK; r++)
                product[r] = product[r] * 256 + found[limb * BLOCK + r];
        if (j->ones)
            for (int r = 0; r < BLOCK; r++) product[r] = 2 * product[r] + w->code_sums[r];
        for (int r = 0; r < BLOCK; r++)
            w->total[t * BLOCK + r] += (product[r] * half - sum) * unit * step[r];
    }
}

/* The row in a place, where there is one. Neighbours lie far apart: memory is read in ROWS streams,
   since what a processor fetches ahead of a stream ends with its page. */
INLINE long row_in(const job *j, long place) {
    return place % ROWS * parts_of(j->rows, ROWS) + place / ROWS;
}

/* The same; places without a row repeat the last one. */
INLINE long row_of(const job *j, long place) { return least(row_in(j, place), j->rows - 1); }

/* A block of places from `start` times all tokens, one segment. */
static void run_segment(const job *j, long start, long stop, long s, workspace *w) {
    const layout *l = &j->l;
    float step[BLOCK];
    for (long at = 0; at < stop - start; at += ROWS) {
        const uint8_t *rows[ROWS];
        for (int r = 0; r < ROWS; r++) {
            rows[r] = j->codes + row_of(j, start + at + r) * l->row;
        }
        products(j, rows, s, at, w);
    }
    for (long r = 0; r < BLOCK; r++) step[r] = j->step[row_of(j, start + r) * l->segments + s];
    gather(j, step, s, w);
}

/* The same, all segments. */
static void run_block(const job *j, long start, long stop, workspace *w) {
    for (long r = 0; r < BLOCK; r++) {
        double bias = j->bias ? j->bias[row_of(j, start + r)] : 0;
        for (long t = 0; t < j->tokens; t++) w->total[t * BLOCK + r] = bias;
    }
    for (long s = 0; s < j->l.segments; s++) run_segment(j, start, stop, s, w);
    for (int stream = 0; stream < ROWS; stream++) { /* its rows lie together */
        const long first = row_in(j, start + stream);
        const long count = least((stop - start) / ROWS, j->rows - first);
        for (long t = 0; t < j->tokens; t++) {
            const double *total = w->total + t * BLOCK + stream;
            float *y = j->y + t * j->rows + first;
            for (long i = 0; i < count; i++) y[i] = (float)total[i * ROWS];
        }
    }
}

static void *room(long bytes) { return aligned_alloc(LINE, (parts_of(bytes, LINE) + 1) * LINE); }

static int run(const job *j, int threads) {
    const long places = parts_of(j->rows, ROWS) * ROWS;
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        workspace w = {
            .bytes = room(ROWS * j->l.panel),
            .found = room(j->columns * BLOCK * sizeof *w.found),
            .total = room(j->tokens * BLOCK * sizeof *w.total),
        };
        failed = !w.bytes || !w.found || !w.total;
#pragma omp for schedule(static)
        for (long start = 0; start < places; start += BLOCK)
            if (!failed) run_block(j, start, least(start + BLOCK, places), &w);
        free(w.bytes);
        free(w.found);
        free(w.total);
    }
    return failed ? NO_MEMORY : 0;
}

static int reserve(job *j) {
    j->columns = j->tokens * j->limbs;
    j->sums = calloc(j->tokens * j->l.segments + 1, sizeof *j->sums);
    j->units = calloc(j->tokens + 1, sizeof *j->units);
    j->panels = room(j->columns * j->l.segments * j->l.panel);
    return !j->sums || !j->units || !j->panels;
}

static void release(job *j) {
    free(j->sums);
    free(j->units);
    free(j->panels);
    free(j->signs);
}

/* Tokens whose panels stay in the cache. */
static long chunk_of(const job *j) {
    long most = CHUNK / (j->limbs * j->l.segments * j->l.panel + 1);
    return most > 16 ? most : 16;
}

/* Rows of floats as columns. */
static int put_floats(job *j, const float *x, const float *most, int32_t *fixed, int8_t *bytes) {
    if (reserve(j)) return NO_MEMORY;
    for (long t = 0; t < j->tokens; t++) {
        j->units[t] = fix(x + t * j->l.size, j->l.size, most[t], j->limbs, fixed);
        sum_segments(fixed, &j->l, j->sums + t * j->l.segments);
        for (int limb = 0; limb < j->limbs; limb++) {
            limb_of(fixed, j->l.size, limb, bytes);
            spread(bytes, &j->l, j->panels, j->columns, t * j->limbs + limb);
        }
    }
    return 0;
}

/* y[t,n] = sum_k x[t,k] * weight[n,k] + bias[n]; `limbs` bytes at least for an activation. */
API int resplice_linear(
    const float *x, long tokens, long size, int limbs, const uint8_t *codes, long rows, int bits,
    const float *step, long group, const float *bias, float *y, int threads
) {
    job j = {.l = layout_of(size, bits, group), .rows = rows, .codes = codes, .step = step,
             .bias = bias, .limbs = limbs};
    float *most = malloc((tokens + 1) * sizeof *most);
    int32_t *fixed = malloc((size + 1) * sizeof *fixed);
    int8_t *bytes = malloc(size + 1);
    int failed = most && fixed && bytes ? 0 : NO_MEMORY;
    for (long t = 0; t < tokens && !failed; t++) {
        most[t] = largest(x + t * size, size);
        if (isinf(most[t])) failed = NOT_FINITE;
        else if (j.limbs == limbs) j.limbs = limbs_for(x + t * size, size, most[t], limbs);
    }
    long chunk = chunk_of(&j);
    for (long t = 0; t < tokens && !failed; t += chunk) {
        job part = j;
        part.tokens = least(chunk, tokens - t);
        part.y = y + t * rows;
        failed = put_floats(&part, x + t * size, most + t, fixed, bytes);
        if (!failed) failed = run(&part, threads);
        release(&part);
    }
    free(most);
    free(fixed);
    free(bytes);
    return failed;
}

static float of_half(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

/* The nearest bfloat16, of two the even one; overflow is infinite, as the sums were finite. */
static uint16_t to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The same in bfloat16, with two bytes for an activation. */
API int resplice_linear_bfloat16(
    const uint16_t *x, long tokens, long size, const uint8_t *codes, long rows, int bits,
    const float *step, long group, const float *bias, uint16_t *y, int threads
) {
    float *wide = malloc((tokens * (size + rows) + 1) * sizeof *wide), *sums = wide + tokens * size;
    if (!wide) return NO_MEMORY;
    for (long i = 0; i < tokens * size; i++) wide[i] = of_half(x[i]);
    int failed = resplice_linear(wide, tokens, size, 2, codes, rows, bits, step, group, bias, sums,
                                 threads);
    for (long i = 0; i < tokens * rows && !failed; i++) y[i] = to_half(sums[i]);
    free(wide);
    return failed;
}

/* Rows of codes as columns. The integers multiplied are 2a + 1, of half a step each; they leave a
   byte where a has eight bits, and then 2 * (product of a) + (sum of codes) is taken instead. */
static int put_codes(job *j, const int8_t *a, const float *x_step, int8_t *bytes) {
    if (reserve(j)) return NO_MEMORY;
    for (long t = 0; t < j->tokens; t++) {
        const int8_t *row = a + t * j->l.size;
        j->units[t] = x_step[t] / 2.0;
        sum_odd(row, &j->l, j->sums + t * j->l.segments);
        if (!j->ones)
            for (long k = 0; k < j->l.size; k++) bytes[k] = (int8_t)(2 * row[k] + 1);
        spread(j->ones ? row : bytes, &j->l, j->panels, j->columns, t);
    }
    return 0;
}

/* The same where both are one bit: only signs are needed. */
static int put_signs(job *j, const int8_t *a, const float *x_step) {
    if (reserve(j)) return NO_MEMORY;
    j->signs = calloc(j->tokens * j->l.row + 1, 1);
    if (!j->signs) return NO_MEMORY;
    for (long t = 0; t < j->tokens; t++) {
        j->units[t] = x_step[t] / 2.0;
        sign_bits(a + t * j->l.size, j->l.size, j->signs + t * j->l.row);
    }
    return 0;
}

/* The same with activations (a + 1/2) * x_step[t] of x_bits bits, a in signed bytes. */
API int resplice_code_linear(
    const int8_t *a, const float *x_step, int x_bits, long tokens, long size,
    const uint8_t *codes, long rows, int bits, const float *step, long group, const float *bias,
    float *y, int threads
) {
    job j = {.l = layout_of(size, bits, group), .rows = rows, .codes = codes, .step = step,
             .bias = bias, .limbs = 1, .ones = x_bits == 8};
    int8_t *bytes = malloc(size + 1);
    int failed = bytes ? 0 : NO_MEMORY;
    long chunk = chunk_of(&j);
    for (long t = 0; t < tokens && !failed; t += chunk) {
        job part = j;
        part.tokens = least(chunk, tokens - t);
        part.y = y + t * rows;
        if (bits == 1 && x_bits == 1) failed = put_signs(&part, a + t * size, x_step + t);
        else failed = put_codes(&part, a + t * size, x_step + t, bytes);
        if (!failed) failed = run(&part, threads);
        release(&part);
    }
    free(bytes);
    return failed;
}

/* How fast products of bytes are here: 2 beats float32 ones, 1 where numbers take two bytes. */
API int resplice_dots_bytes(void) {
#if defined(VNNI)
    return 2;
#elif defined(__AVX2__)
    return 1;
#else
    return 0;
#endif
}
