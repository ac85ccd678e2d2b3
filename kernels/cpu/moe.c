/* One token through a carved feed-forward layer: router, choice, chosen experts, their sum.
 *
 * The meaning is kernels/moe_ffn.py; this is the case of one float32 token, where a call takes as
 * long as its weights take to read, so everything else happens between two passes over them.
 */
#include <math.h>

typedef long size;
typedef float vec __attribute__((vector_size(32), aligned(4)));

enum { SILU, GELU, GELU_TANH, GELU_SIGMOID, RELU, RELU_SQUARED, SIGMOID, TANH };
enum { ABSOLUTE, SIGNED, LINEAR };

static float total(const vec *sums) {
    vec all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float found = 0;
    for (int j = 0; j < 8; j++) found += all[j];
    return found;
}

/* Products of two rows with x: two streams keep the memory busier than one (a fifth, measured). */
static void dots(const float *a, const float *b, const float *x, size n, float *found) {
    vec s[4] = {{0}}, t[4] = {{0}};
    size i = 0;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 4; j++) {
            vec v = *(const vec *)(x + i + 8 * j);
            s[j] += *(const vec *)(a + i + 8 * j) * v;
            t[j] += *(const vec *)(b + i + 8 * j) * v;
        }
    found[0] = total(s);
    found[1] = total(t);
    for (; i < n; i++) {
        found[0] += a[i] * x[i];
        found[1] += b[i] * x[i];
    }
}

static float dot(const float *a, const float *x, size n) {
    float found[2];
    dots(a, a, x, n, found);
    return found[0];
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
    size step = gated ? 1 : 2, apart = gated ? neurons : 1;
    for (size r = lo; r < hi; r += step) {
        size other = gated || r + 1 < hi ? r + apart : r;
        float z[2];
        dots(w + r * width, w + other * width, x, width, z);
        if (bias) {
            z[0] += bias[r];
            z[1] += bias[other];
        }
        h[r] = activated(z[0], kind);
        if (gated)
            h[r] *= z[1];
        else
            h[other] = activated(z[1], kind);
    }
}

/* out[lo..hi] += gate * W h */
static void combine(const float *w, const float *h, float gate, float *out, size neurons, size lo,
                    size hi) {
    for (size r = lo; r < hi; r += 2) {
        size other = r + 1 < hi ? r + 1 : r;
        float y[2];
        dots(w + r * neurons, w + other * neurons, h, neurons, y);
        out[r] += gate * y[0];
        if (other > r) out[other] += gate * y[1];
    }
}

/* How much every expert wants the token. */
static void score(const float *router, const float *bias, const float *x, float *scores,
                  float *scratch, size rows, size experts, size width, int kind, int gated,
                  int rule) {
    if (rule == LINEAR) {
        for (size e = 0; e < experts; e++)
            scores[e] = dot(router + e * width, x, width) + (bias ? bias[e] : 0);
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
#define API __attribute__((visibility("default")))
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
