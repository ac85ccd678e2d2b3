/* One token through a carved feed-forward layer: router, choice, chosen experts, their sum.
 *
 * The meaning is kernels/moe_ffn.py; this is the case of one float32 token, where a call takes as
 * long as its weights take to read, so everything else happens between two passes over them.
 */
#include "vectors.h"

typedef long size;
typedef float vec __attribute__((vector_size(32), aligned(4)));

enum { SILU, GELU, GELU_TANH, GELU_SIGMOID, RELU, RELU_SQUARED, SIGMOID, TANH };
enum { ABSOLUTE, SIGNED, LINEAR };
enum { STREAMS = 4 };

/* Products of STREAMS rows with x. Memory gives more when it is read in several places at once: what
   a processor fetches ahead of one of them ends with its page. */
static void dots(const float *const rows[STREAMS], const float *x, size n, float found[STREAMS]) {
    vec s[STREAMS][2] = {{{0}}};
    size i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 2; j++) {
            vec v = *(const vec *)(x + i + 8 * j);
            for (int r = 0; r < STREAMS; r++) s[r][j] += *(const vec *)(rows[r] + i + 8 * j) * v;
        }
    for (int r = 0; r < STREAMS; r++) {
        vec all = s[r][0] + s[r][1];
        found[r] = 0;
        for (int j = 0; j < 8; j++) found[r] += all[j];
        for (size k = i; k < n; k++) found[r] += rows[r][k] * x[k];
    }
}

/* Where a stream is after `step` rows, of a range divided among `streams`; may pass its end. */
static size row_of(size lo, size hi, int streams, int stream, size step) {
    return lo + stream * parts_of(hi - lo, streams) + step;
}

static float activated(float x, int kind) {
    switch (kind) {
    case SILU: return x / (1 + expf(-x));
    case GELU: return 0.5f * x * (1 + erff(x * (float)M_SQRT1_2));
    case GELU_TANH: return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    case GELU_SIGMOID: return x / (1 + expf(-1.702f * x));
    case RELU: return x > 0 ? x : 0;
    case RELU_SQUARED: return x > 0 ? x * x : 0;
    case SIGMOID: return 1 / (1 + expf(-x));
    default: return tanhf(x);
    }
}

/* Neurons lo..hi of a block: projections of x, activated, into h. Gated blocks hold gates first. */
static void project(const float *w, const float *bias, const float *x, float *h, size neurons,
                    size width, int kind, int gated, size lo, size hi) {
    const int own = gated ? STREAMS / 2 : STREAMS; /* the others read what is gated */
    for (size i = 0; i < parts_of(hi - lo, own); i++) {
        size row[STREAMS];
        const float *from[STREAMS];
        float z[STREAMS];
        for (int r = 0; r < STREAMS; r++) {
            row[r] = least(row_of(lo, hi, own, r % own, i), hi - 1) + (r < own ? 0 : neurons);
            from[r] = w + row[r] * width;
        }
        dots(from, x, width, z);
        for (int r = 0; r < STREAMS && bias; r++) z[r] += bias[row[r]];
        for (int r = 0; r < own; r++) h[row[r]] = activated(z[r], kind) * (gated ? z[own + r] : 1);
    }
}

/* out[lo..hi] += gate * W h */
static void combine(const float *w, const float *h, float gate, float *out, size neurons, size lo,
                    size hi) {
    for (size i = 0; i < parts_of(hi - lo, STREAMS); i++) {
        size row[STREAMS];
        const float *from[STREAMS];
        float y[STREAMS];
        for (int r = 0; r < STREAMS; r++) {
            row[r] = row_of(lo, hi, STREAMS, r, i);
            from[r] = w + least(row[r], hi - 1) * neurons;
        }
        dots(from, h, neurons, y);
        for (int r = 0; r < STREAMS; r++)
            if (row[r] < hi) out[row[r]] += gate * y[r];
    }
}

/* How much every expert wants the token. */
static void score(const float *router, const float *bias, const float *x, float *scores,
                  float *scratch, size rows, size experts, size width, int kind, int gated,
                  int rule) {
    if (rule == LINEAR) {
        for (size e = 0; e < experts; e += STREAMS) {
            const float *from[STREAMS];
            float found[STREAMS];
            for (int r = 0; r < STREAMS; r++)
                from[r] = router + (e + r < experts ? e + r : e) * width;
            dots(from, x, width, found);
            for (size r = 0; r < STREAMS && e + r < experts; r++)
                scores[e + r] = found[r] + (bias ? bias[e + r] : 0);
        }
        return;
    }
    size neurons = gated ? rows / 2 : rows, each = neurons / experts;
    project(router, bias, x, scratch, neurons, width, kind, gated, 0, neurons);
    for (size e = 0; e < experts; e++) {
        scores[e] = 0;
        for (size j = e * each; j < (e + 1) * each; j++)
            scores[e] += rule == ABSOLUTE ? fabsf(scratch[j]) : scratch[j];
    }
}

/* The largest of softmax(s) + balance; equal values go to the higher score, then the lower index. */
static void choose(const float *scores, const float *scale, const float *balance, float *p,
                   float *wanted, size experts, size active, size *chosen, float *gates) {
    float most = -INFINITY, sum = 0;
    for (size e = 0; e < experts; e++) most = fmaxf(most, scores[e]);
    for (size e = 0; e < experts; e++) sum += p[e] = expf(scores[e] - most);
    for (size e = 0; e < experts; e++) {
        p[e] /= sum;
        wanted[e] = balance ? p[e] + balance[e] : scores[e];
    }
    for (size a = 0; a < active; a++) {
        size best = -1;
        for (size e = 0; e < experts; e++)
            if (!isnan(wanted[e]) && (best < 0 || wanted[e] > wanted[best] ||
                (wanted[e] == wanted[best] && scores[e] > scores[best])))
                best = e;
        if (best < 0) best = 0; /* nothing but NaN: the result is NaN whoever computes it */
        chosen[a] = best;
        gates[a] = scale ? 1 + p[best] * scale[best] : 1;
        wanted[best] = NAN;
    }
}

/* scratch holds shared + active * neurons + 3 * experts + rows floats, and out `outputs`. */
API int resplice_moe_one_token(
    const float *x, const float *shared_in, const float *shared_in_bias, const float *shared_out,
    const float *experts_in, const float *experts_in_bias, const float *experts_out,
    const float *out_bias, const float *router, const float *router_bias, const float *scale,
    const float *balance, float *out, float *scratch, size width, size outputs, size shared,
    size neurons, size experts, size rows, size active, int kind, int gated, int rule, int threads)
{
    size inner = (gated ? 2 : 1) * neurons, chosen[active + 1];
    float gates[active + 1];
    float *h = scratch, *scores = h + shared + active * neurons, *p = scores + experts;
    float *wanted = p + experts;
    if (active && router) {
        score(router, router_bias, x, scores, wanted + experts, rows, experts, width, kind, gated,
              rule);
        choose(scores, scale, balance, p, wanted, experts, active, chosen, gates);
    } else
        for (size a = 0; a < active; a++) chosen[a] = a, gates[a] = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int t = 0; t < threads; t++) {
            project(shared_in, shared_in_bias, x, h, shared, width, kind, gated,
                    shared * t / threads, shared * (t + 1) / threads);
            for (size a = 0; a < active; a++)
                project(experts_in + chosen[a] * inner * width,
                        experts_in_bias ? experts_in_bias + chosen[a] * inner : 0, x,
                        h + shared + a * neurons, neurons, width, kind, gated,
                        neurons * t / threads, neurons * (t + 1) / threads);
        }
#pragma omp for schedule(static)
        for (int t = 0; t < threads; t++) {
            size lo = outputs * t / threads, hi = outputs * (t + 1) / threads;
            for (size r = lo; r < hi; r++) out[r] = out_bias ? out_bias[r] : 0;
            if (shared) combine(shared_out, h, 1, out, shared, lo, hi);
            for (size a = 0; a < active; a++)
                combine(experts_out + chosen[a] * outputs * neurons, h + shared + a * neurons,
                        gates[a], out, neurons, lo, hi);
        }
    }
    return 0;
}
