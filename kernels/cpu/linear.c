/* Linear layers on packed few-bit weights, for a CPU.

   A weight is (code - 2^(b-1) + 1/2) * step. For few tokens nothing is unpacked in memory: a vector
   of codes is shifted and masked to one code a byte, and meets activations that were put into the
   same order before (see panels.h). For more tokens the codes of ROWS rows are spread to bytes once.
   Products are summed exactly, so results depend on no order and no number of threads; the rounding
   of a row of floats to 24 bits is what float32 arithmetic loses as well. */

#include "panels.h"
#include "signs.h"

#define LINE 64            /* bytes of a cache line, which no vector should straddle */
#define AHEAD (24 << 10)   /* bytes of weights on their way while others are multiplied */
#define CHUNK (512L << 10) /* bytes of panels that stay in the cache while rows pass by */

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

/* What one thread needs: all for ROWS rows. */
typedef struct {
    uint8_t *fields; /* three-bit codes in four bits */
    uint8_t *bytes;  /* codes of one segment, one a byte */
    int32_t *found;  /* [columns, ROWS], products of one segment */
    int32_t code_sums[ROWS];
    double *total;   /* [tokens, ROWS] */
} workspace;

/* Sums of one run: of narrow codes, or of wide ones. */
typedef struct {
    narrow_sum near[ROWS][COLUMNS], near_ones[ROWS];
    s32s wide[ROWS][COLUMNS], wide_ones[ROWS];
} sums;

/* One vector of ROWS rows times `count` columns, and times one. */
INLINE void multiply(
    const u8s fields[ROWS], const int8_t *x, sums *sum, const int field, const int wide,
    const int count, const int ones
) {
    u8s all[ROWS] = {0};
#pragma GCC unroll 8
    for (int part = 0; part < 8 / field; part++) {
        u8s codes[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            codes[r] = part_of(fields[r], field, part);
            if (ones) all[r] += codes[r];
        }
#pragma GCC unroll 4
        for (int c = 0; c < count; c++) {
            u8s bytes = load(x + (part * count + c) * WIDTH);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
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
    if (!ones) return;
#ifdef COUNT_BITS
    if (field == 1)
        for (int r = 0; r < ROWS; r++) all[r] = COUNT_BITS(fields[r]);
#endif
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        if (wide) sum->wide_ones[r] = add_wide(sum->wide_ones[r], all[r], (u8s){0} + 1);
        else sum->near_ones[r] = add_narrow(sum->near_ones[r], all[r], (u8s){0} + 1);
    }
}

/* Sums of code * byte over `bytes` of each of ROWS rows, for one panel of `count` columns; and of
   the codes alone. Narrow sums are widened after `every` vectors. */
INLINE void tile(
    const uint8_t *const rows[ROWS], long bytes, const int8_t *x, int32_t *found,
    int32_t *code_sums, long every, const int field, const int wide, const int count, const int ones
) {
    const long whole = bytes / WIDTH;
    const long stride = 8 / field * count * WIDTH;
    s32s total[COLUMNS][ROWS] = {0}, total_ones[ROWS] = {0};
    u8s fields[ROWS];
    for (long i = 0; i * WIDTH < bytes;) {
        sums sum = {0};
        for (long stop = least(i + every, whole); i < stop; i++, x += stride) {
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                fields[r] = load(rows[r] + i * WIDTH);
                __builtin_prefetch(rows[r] + i * WIDTH + AHEAD, 0, 2); /* also past the weights */
            }
            multiply(fields, x, &sum, field, wide, count, ones);
        }
        if (i == whole && i * WIDTH < bytes) { /* do not read past the row */
            for (int r = 0; r < ROWS; r++) {
                fields[r] = (u8s){0};
                memcpy(&fields[r], rows[r] + i * WIDTH, bytes - i * WIDTH);
            }
            multiply(fields, x, &sum, field, wide, count, ones);
            i++;
        }
        for (int r = 0; r < ROWS; r++) {
            for (int c = 0; c < count; c++)
                total[c][r] += wide ? sum.wide[r][c] : widened(sum.near[r][c]);
            if (ones) total_ones[r] += wide ? sum.wide_ones[r] : widened(sum.near_ones[r]);
        }
    }
    for (int c = 0; c < count; c++) sum_lanes(total[c], found + c * ROWS);
    if (ones) sum_lanes(total_ones, code_sums);
}

INLINE void tile_by(
    const uint8_t *const rows[ROWS], long bytes, const int8_t *x, int32_t *found,
    int32_t *code_sums, long every, const int field, const int wide, const int ones, long count
) {
    switch (count) {
    case 1: tile(rows, bytes, x, found, code_sums, every, field, wide, 1, ones); break;
    case 2: tile(rows, bytes, x, found, code_sums, every, field, wide, 2, ones); break;
    case 3: tile(rows, bytes, x, found, code_sums, every, field, wide, 3, ones); break;
    default: tile(rows, bytes, x, found, code_sums, every, field, wide, 4, ones); break;
    }
}

INLINE void tile_for(
    const uint8_t *const rows[ROWS], long bytes, const int8_t *x, int32_t *found,
    int32_t *code_sums, long every, const int field, const int wide, long count
) {
    if (code_sums) tile_by(rows, bytes, x, found, code_sums, every, field, wide, 1, count);
    else tile_by(rows, bytes, x, found, NULL, every, field, wide, 0, count);
}

static void tile_of(
    const uint8_t *const rows[ROWS], long bytes, const int8_t *x, int32_t *found,
    int32_t *code_sums, long every, int field, int wide, long count
) {
    switch (field) {
    case 1: tile_for(rows, bytes, x, found, code_sums, every, 1, 0, count); break;
    case 2: tile_for(rows, bytes, x, found, code_sums, every, 2, 0, count); break;
    case 4: tile_for(rows, bytes, x, found, code_sums, every, 4, 0, count); break;
    default:
        if (wide) tile_for(rows, bytes, x, found, code_sums, every, 8, 1, count);
        else tile_for(rows, bytes, x, found, code_sums, every, 8, 0, count);
    }
}

/* Products of a segment of ROWS rows with all columns. */
static void products(
    const job *j, const uint8_t *const rows[ROWS], long s, workspace *w
) {
    const layout *l = &j->l;
    long from = s * l->length, count = least(l->length, l->size - from);
    long bytes = parts_of(count * l->field, 8), groups = parts_of(j->columns, COLUMNS);
    const uint8_t *at[ROWS];
    for (int r = 0; r < ROWS; r++) at[r] = rows[r] + from * l->field / 8;
    if (j->signs) {
        for (long t = 0; t < j->tokens; t++)
            for (int r = 0; r < ROWS; r++)
                w->found[t * ROWS + r] =
                    (int32_t)(count - 2 * differing(at[r], j->signs + t * l->row + from / 8, count));
        return;
    }
    int field = l->field;
    if (groups > 2 && l->bits < 8) {
        for (int r = 0; r < ROWS; r++) {
            to_bytes(at[r], bytes, field, w->bytes + r * l->panel);
            at[r] = w->bytes + r * l->panel;
        }
        bytes = parts_of(bytes, WIDTH) * WIDTH * l->parts;
        field = 8;
    }
    const int wide = l->bits == 8;
    const long every = wide ? bytes : LONGEST_RUN((1 << l->bits) - 1) * field / 8;
    for (long g = 0; g < groups; g++) {
        long width = least(COLUMNS, j->columns - g * COLUMNS);
        const int8_t *x = j->panels + (g * COLUMNS * l->segments + s * width) * l->panel;
        int32_t *code_sums = j->ones && g == 0 ? w->code_sums : NULL;
        tile_of(at, bytes, x, w->found + g * COLUMNS * ROWS, code_sums, every, field, wide, width);
    }
}

/* Adds a segment's products, in units of the weights' steps, to the totals. */
static void gather(const job *j, const float *const steps[ROWS], long s, const workspace *w) {
    const int levels = (1 << j->l.bits) - 1;
    for (long t = 0; t < j->tokens; t++) {
        const int32_t *found = w->found + t * j->limbs * ROWS;
        int64_t sum = levels * j->sums[t * j->l.segments + s];
        for (int r = 0; r < ROWS; r++) {
            int64_t product = 0;
            for (int limb = 0; limb < j->limbs; limb++)
                product += found[limb * ROWS + r] * (1LL << (8 * limb));
            if (!j->signs) product *= 2;
            if (j->ones) product = 2 * (product + w->code_sums[r]);
            w->total[t * ROWS + r] += (double)(product - sum) / 2 * j->units[t] * steps[r][s];
        }
    }
}

/* ROWS rows from `start` times all tokens. */
static void run_rows(const job *j, long start, workspace *w) {
    const layout *l = &j->l;
    const uint8_t *rows[ROWS];
    const float *steps[ROWS];
    for (int r = 0; r < ROWS; r++) {
        long n = least(start + r, j->rows - 1); /* rows that lack are the last one's twins */
        rows[r] = j->codes + n * l->row;
        steps[r] = j->step + n * l->segments;
        if (l->bits == 3) {
            uint8_t *fields = w->fields + r * parts_of(l->size, 2);
            expand(rows[r], l->size, fields);
            rows[r] = fields;
        }
        for (long t = 0; t < j->tokens; t++) w->total[t * ROWS + r] = j->bias ? j->bias[n] : 0;
    }
    for (long s = 0; s < l->segments; s++) {
        products(j, rows, s, w);
        gather(j, steps, s, w);
    }
    for (long t = 0; t < j->tokens; t++)
        for (long n = start; n < least(start + ROWS, j->rows); n++)
            j->y[t * j->rows + n] = (float)w->total[t * ROWS + n - start];
}

static void *room(long bytes) { return aligned_alloc(LINE, (parts_of(bytes, LINE) + 1) * LINE); }

static int run(const job *j, int threads) {
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        workspace w = {
            .fields = room(ROWS * parts_of(j->l.size, 2)),
            .bytes = room(ROWS * j->l.panel),
            .found = room(j->columns * ROWS * sizeof *w.found),
            .total = room(j->tokens * ROWS * sizeof *w.total),
        };
        failed = !w.fields || !w.bytes || !w.found || !w.total;
#pragma omp for schedule(static)
        for (long start = 0; start < j->rows; start += ROWS)
            if (!failed) run_rows(j, start, &w);
        free(w.fields);
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

/* Whether products of bytes are fast enough here to beat float32 ones whatever the tokens. */
API int resplice_dots_bytes(void) {
#ifdef VNNI
    return 1;
#else
    return 0;
#endif
}
