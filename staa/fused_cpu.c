// The STAA neuron on a CPU, there and back, one sample after another: all that is computed of one lies in the cache.
// fused_staa_cpu.py compiles it, with REAL as float or double. What it computes stands in attention.py, in the order of
// fused_staa.py, whose letters these are.

#include <math.h>
#include <stdlib.h>
#include "fused_cpu.h"

typedef struct {  // NULL where a block is off
    const real *pe_input, *pe_membrane, *pe_output;             // (T, C)
    const real *key, *query, *query_bias, *norm, *norm_bias;    // (C,), (J, C), (J,), (J,), (J,)
    const real *value, *value_bias;                             // (C, J), (C,)
    const real *squeeze, *squeeze_bias, *excite, *excite_bias;  // (H, C), (H,), (C, H), (C,)
    const unsigned char *kept;                                  // (T,): 0 where TSRD drops it all
} parameters;

// What is computed of one time step of one sample: M numbers, in the order of fused_staa_cpu.COLUMNS.
typedef struct {
    real *context, *hat, *n, *added, *mean, *pool, *hidden, *p, *slope;
    real *dexcite, *dsqueeze, *dvalue, *dn, *dq, *dkey, *doutput, *dmembrane, *dinput, *dmean, *scale;
} row;

static row at(real *work, count i, const sizes *d) {
    count C = d->C, J = d->J, H = d->H;
    real *next = work + i * d->M;
    row r;
    #define COLUMN(name, size) r.name = next; next += size
    COLUMN(context, C); COLUMN(hat, J); COLUMN(n, J); COLUMN(added, C); COLUMN(mean, C); COLUMN(pool, C);
    COLUMN(hidden, H); COLUMN(p, C); COLUMN(slope, C); COLUMN(dexcite, C); COLUMN(dsqueeze, H); COLUMN(dvalue, C);
    COLUMN(dn, J); COLUMN(dq, J); COLUMN(dkey, C); COLUMN(doutput, C); COLUMN(dmembrane, C); COLUMN(dinput, C);
    COLUMN(dmean, C); COLUMN(scale, 1);
    return r;
}

static void softmax(real *k, count N) {
    real largest = -INFINITY;
    double sum = 0;
    for (count n = 0; n < N; n++) largest = k[n] > largest ? k[n] : largest;
    for (count n = 0; n < N; n++) sum += k[n] = exp(k[n] - largest);
    for (count n = 0; n < N; n++) k[n] /= sum;
}

// GC, eqs. 7 to 9, into `added`; and the mean over space.
static void look(const sizes *d, const parameters *g, const real *x, real *k, row r, real *room) {
    count N = d->N, C = d->C, J = d->J;
    for (count n = 0; n < N; n++) k[n] = (real)1 / N;
    over_space(d, x, k, r.mean);
    if (!g->key) return;
    over_channels(d, x, g->key, k);  // the bias, and PE, would cancel in the softmax
    softmax(k, N);
    over_space(d, x, k, r.context);
    for (count c = 0; c < C; c++) r.context[c] += r.added[c];
    linear(g->query, g->query_bias, r.context, r.hat, J, C);
    double mean = 0, variance = 0;
    for (count j = 0; j < J; j++) mean += r.hat[j];
    for (count j = 0; j < J; j++) variance += (r.hat[j] - mean / J) * (r.hat[j] - mean / J);
    *r.scale = 1 / sqrt(variance / J + 1e-5);
    for (count j = 0; j < J; j++) {
        r.hat[j] = (r.hat[j] - mean / J) * *r.scale;
        real y = r.hat[j] * g->norm[j] + g->norm_bias[j];
        r.n[j] = y > 0 ? y : 0;
    }
    linear(g->value, g->value_bias, r.n, room, C, J);
    for (count c = 0; c < C; c++) r.added[c] += room[c];
}

// Of sample b, spikes into s, or where it is NULL, potentials into u, time steps `apart`. k (T, N); rows of `work`:
// every `by`th.
static void forward(const sizes *d, const parameters *g, rule z, count b, const real *x, real *s, real *u, count apart,
                    real *work, count by, real *k, real *hm, real *room) {
    count T = d->T, C = d->C, map = d->N * C;
    real *p = room, *q = room + C, *w = room + 2 * C, *hm_mean = room + 3 * C;
    room += 4 * C;
    for (count t = 0; t < T; t++) {
        row r = at(work, t * by, d);
        for (count c = 0; c < C; c++) r.added[c] = g->pe_input ? g->pe_input[t * C + c] : 0;
        look(d, g, x + (t * d->B + b) * map, k + t * d->N, r, room);
    }
    for (count i = 0; i < map; i++) hm[i] = z.v_reset;
    for (count c = 0; c < C; c++) hm_mean[c] = z.v_reset;
    for (count t = 0; t < T; t++) {
        row r = at(work, t * by, d);
        count kept = !g->kept || g->kept[t], here = (t * d->B + b) * map;
        for (count c = 0; c < C; c++) {
            real pe = g->pe_membrane ? z.leak * g->pe_membrane[t * C + c] : 0;
            r.slope[c] = pe - r.added[c];
            r.pool[c] = r.mean[c] + r.added[c] + pe + hm_mean[c];
            r.p[c] = z.decay;
        }
        if (g->squeeze) {  // eq. 12
            linear(g->squeeze, g->squeeze_bias, r.pool, r.hidden, d->H, C);
            for (count j = 0; j < d->H; j++) r.hidden[j] = r.hidden[j] > 0 ? r.hidden[j] : 0;
            linear(g->excite, g->excite_bias, r.hidden, r.p, C, d->H);
            for (count c = 0; c < C; c++) r.p[c] = z.alpha / (1 + exp(-r.p[c]));
        }
        for (count c = 0; c < C; c++) {
            real pe = g->pe_output ? g->pe_output[t * C + c] : 0;
            p[c] = kept ? r.p[c] : 1;
            q[c] = kept ? z.total - r.p[c] : 1;
            w[c] = kept ? z.total * r.added[c] + z.offset + pe + r.p[c] * r.slope[c] : 0;
        }
        step(d, !s, x + here, hm, p, q, w, s ? s + here : u + t * apart, hm_mean, room, z);
        for (count c = 0; c < C; c++) hm_mean[c] /= d->N;
    }
}

// The gradient of x, in the place of du: q dU, and what comes through the mean and GC's attention.
static void look_backward(const sizes *d, const parameters *g, const real *x, const real *k, const real *q, row r,
                          real *du, real *dl, real *dcontext) {
    count N = d->N, C = d->C, J = d->J;
    for (count c = 0; c < C; c++) dcontext[c] = 0;
    for (count n = 0; n < N; n++) dl[n] = 0;
    if (g->key) {
        double a = 0, b = 0, mean = 0;
        sum_of_rows(g->value, r.dvalue, r.dn, C, J);
        for (count j = 0; j < J; j++) {
            r.dn[j] = r.n[j] > 0 ? r.dn[j] : 0;
            a += r.dn[j] * g->norm[j];
            b += r.dn[j] * g->norm[j] * r.hat[j];
        }
        for (count j = 0; j < J; j++) r.dq[j] = *r.scale * (r.dn[j] * g->norm[j] - a / J - r.hat[j] * (b / J));
        sum_of_rows(g->query, r.dq, dcontext, J, C);
        over_channels(d, x, dcontext, dl);
        for (count n = 0; n < N; n++) mean += k[n] * dl[n];
        for (count n = 0; n < N; n++) dl[n] = k[n] * (dl[n] - mean);  // of k before the softmax
        over_space(d, x, dl, r.dkey);
    }
    for (count c = 0; c < C; c++) r.dinput[c] = r.dvalue[c] + dcontext[c];
    const real *key = g->key ? g->key : dcontext;
    if (d->last) for (count n = 0; n < N; n++, du += C) {
        real k_n = k[n], dl_n = dl[n];
        #pragma omp simd
        for (count c = 0; c < C; c++) du[c] = q[c] * du[c] + k_n * dcontext[c] + dl_n * key[c] + r.dmean[c];
    }
    else for (count c = 0; c < C; c++, du += N) {
        real q_c = q[c], dcontext_c = dcontext[c], key_c = key[c], dmean_c = r.dmean[c];
        #pragma omp simd
        for (count n = 0; n < N; n++) du[n] = q_c * du[n] + k[n] * dcontext_c + dl[n] * key_c + dmean_c;
    }
}

// Of sample b, the gradient of x, and rows of `work`, of which those of the parameters are made; after `forward`.
static void backward(const sizes *d, const parameters *g, rule z, count b, const real *x, const real *ds,
                     const real *slopes, real *dx, real *work, const real *k, const real *u, real *dl, real *room) {
    count T = d->T, B = d->B, N = d->N, C = d->C, map = N * C;
    real *p = room, *dp = room + C, *dmean = p;
    room += 2 * C;
    for (count c = 0; c < C; c++) p[c] = 0;
    for (count t = T - 1; t >= 0; t--) {
        row r = at(work, t * B, d);
        count kept = !g->kept || g->kept[t], here = (t * B + b) * map;
        step_backward(d, u + t * map, t ? u + (t - 1) * map : NULL, x + here, ds + here,
                      slopes ? slopes + (t * (d->end - d->first) + b - d->first) * map : NULL,
                      t < T - 1 ? dx + here + B * map : u + t * map, p, dmean, dx + here, r.doutput, dp, room, z);
        for (count c = 0; c < C; c++) {
            r.dexcite[c] = kept ? (dp[c] + r.slope[c] * r.doutput[c]) * r.p[c] * (1 - r.p[c] / z.alpha) : 0;
            r.dmean[c] = 0;
            p[c] = kept ? r.p[c] : 1;
        }
        if (g->squeeze) {
            sum_of_rows(g->excite, r.dexcite, r.dsqueeze, C, d->H);
            for (count j = 0; j < d->H; j++) r.dsqueeze[j] = r.hidden[j] > 0 ? r.dsqueeze[j] : 0;
            sum_of_rows(g->squeeze, r.dsqueeze, r.dmean, d->H, C);
            for (count c = 0; c < C; c++) r.dmean[c] /= N;
        }
        dmean = r.dmean;
    }
    for (count t = 0; t < T; t++) {
        row r = at(work, t * B, d);
        count kept = !g->kept || g->kept[t], here = (t * B + b) * map;
        for (count c = 0; c < C; c++) {
            r.doutput[c] = kept ? r.doutput[c] : 0;
            real dseen = N * r.dmean[c], dslope = r.p[c] * r.doutput[c];
            r.dvalue[c] = z.total * r.doutput[c] - dslope + dseen;
            r.dmembrane[c] = z.leak * (dslope + dseen);
            p[c] = kept ? z.total - r.p[c] : 1;
        }
        look_backward(d, g, x + here, k + t * N, p, r, dx + here, dl, dp);
    }
}

// Both return whether there was too little memory.

#define EACH_SAMPLE(size, ...)                                            \
    count T = d->T, N = d->N, C = d->C, failed = 0;                       \
    _Pragma("omp parallel reduction(|:failed)")                           \
    {                                                                     \
        real *k = malloc(((T + 1) * N + (size)) * sizeof(real));          \
        real *rest = k + (T + 1) * N;                                     \
        failed = !k;                                                      \
        _Pragma("omp for schedule(dynamic)")                              \
        for (count b = d->first; b < d->end; b++) if (k) { __VA_ARGS__; } \
        free(k);                                                          \
    }                                                                     \
    return failed

// S (T, B, N, C) or (T, B, C, N) of X; or where it is NULL, U, of the samples asked for alone.
count staa(const sizes *d, const parameters *g, const rule *z, const real *x, real *s, real *u) {
    EACH_SAMPLE(N * C + T * d->M + 8 * C,
                forward(d, g, *z, b, x, s, s ? NULL : u + (b - d->first) * N * C, (d->end - d->first) * N * C,
                        rest + N * C, 1, k, rest, rest + N * C + T * d->M));
}

// dX, and of the parameters `work` (T, B, M), from dS, and from slopes, dS/dU, as U above; NULL where they are eq. 5's.
count staa_backward(const sizes *d, const parameters *g, const rule *z, const real *x, const real *ds,
                    const real *slopes, real *dx, real *work) {
    EACH_SAMPLE((T + 1) * N * C + 8 * C,
                real *hm = rest + T * N * C, *room = hm + N * C, *rows = work + b * d->M;
                forward(d, g, *z, b, x, NULL, rest, N * C, rows, d->B, k, hm, room);
                backward(d, g, *z, b, x, ds, slopes, dx, rows, k, rest, k + T * N, room));
}
