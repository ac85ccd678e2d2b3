/* The block Hadamard transform, and rounding after it, for a CPU. */

#include "vectors.h"

typedef float f32x8 __attribute__((vector_size(32)));

#ifdef __clang__
#define SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
typedef int32_t index8 __attribute__((vector_size(32)));
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

/* Rows transformed and rounded to the grid of 2^bits levels; alpha is its clip over the rms. With
   an outlier above 0, rows that reach past so many clips get a grid as wide as they are. */
API int resplice_quest_codes(
    const float *x, long rows, long size, int bits, long block, double alpha, double tiny,
    double outlier, int8_t *codes, float *step, int threads
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
            float unit = (float)found, reach = 0;
            for (long k = 0; outlier > 0 && k < size; k++) {
                float value = fabsf(turned[k]);
                reach = value > reach ? value : reach;
            }
            reach *= (float)(2.0 / ((1 << bits) - 1));
            if (reach > (float)outlier * unit) unit = reach;
            step[r] = unit;
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
