// All that the STAA neuron does to maps on a CPU, eqs. 2, 3, 5, 7 and 14, there and back: see fused_staa_maps.py, whose
// letters these are. fused_cpu.py compiles it, with REAL as float or double.
//
// A map is (N, C), `last`, where channels are last in memory, and (C, N) where not, with N places in space. Numbers are
// chosen by products: of choices a compiler makes jumps, and then it does not compute many numbers at once.

#include <math.h>

// Places whose numbers are summed up at once, of a map that is channels-last and of one that is not: a longer sum would
// be less exact.
#define ROWS 128
#define SOME 1024

typedef REAL real;
typedef long long count;

typedef struct {
    real v_th, v_reset, leak, rest;  // Hm is handed on as leak Hm + rest
    real half, height;               // of eq. 5's rectangle: half its width
} rule;

static inline real fire(real u, rule z) {  // eq. 2
    return u - z.v_th >= 0 ? (real)1 : (real)0;
}

static inline real hand_on(real u, rule z) {  // eq. 3
    real s = fire(u, z);
    return z.leak * (u * (1 - s) + z.v_reset * s) + z.rest;
}

static inline real fire_backward(real u, real ds, real dhm, rule z) {  // eqs. 2, 3 and 5
    real v = u - z.v_th, inside = (v <= z.half) & (v >= -z.half) ? z.height : (real)0;
    return (ds + dhm * (z.v_reset - u)) * inside + dhm * (1 - fire(u, z));
}

// Time steps, (B, N, C) or (B, C, N), in parts: some rows of a sample where channels are last, else some places of a
// channel. p, q, w (B, C); sums (B, parts, C) or (B, C, parts).

#define EACH_PART                                                                                           \
    count size = last ? ROWS : SOME, parts = (N + size - 1) / size;                                         \
    _Pragma("omp parallel for")                                                                             \
    for (count unit = 0; unit < (last ? B : B * C) * parts; unit++) {                                       \
        count owner = unit / parts, from = unit % parts * size, places = N - from < size ? N - from : size; \
        count rows = last ? places : 1, columns = last ? C : places;                                        \
        count start = last ? (owner * N + from) * C : owner * N + from;                                     \
        count i = last ? owner * C : owner, k = last ? unit * C : unit;                                     \
        for (count j = 0; j < (last ? C : 1); j++) CLEAR(k + j);

#define IN_ROWS static inline __attribute__((always_inline)) void  // with constants for what is asked in the loops

IN_ROWS step_rows(int last, int keep, const real *x, const real *hm, const real *p, const real *q, const real *w,
                  real *out, real *after, real *sums, count rows, count columns, rule z) {
    for (count row = 0; row < rows; row++, x += columns, hm += columns, out += columns, after += columns) {
        real sum = 0;
        #pragma omp simd reduction(+:sum)
        for (count j = 0; j < columns; j++) {
            count c = last ? j : 0;
            real u = p[c] * hm[j] + q[c] * x[j] + w[c], next = hand_on(u, z);
            out[j] = keep ? u : fire(u, z);
            after[j] = next;
            if (last) sums[j] += next;
            else sum += next;
        }
        if (!last) sums[0] += sum;
    }
}

// From X[t] and Hm[t-1] to Hm[t], into `after`, its sums over space, and U[t] (keep) or S[t], into `out`.
void step(int last, int keep, const real *x, const real *hm, const real *p, const real *q, const real *w, real *out,
          real *after, real *sums, count B, count N, count C, rule z) {
    #define CLEAR(k) sums[k] = 0
    #define STEP(last, keep) step_rows(last, keep, x + start, hm + start, p + i, q + i, w + i, out + start, \
                                       after + start, sums + k, rows, columns, z)
    EACH_PART
        if (last && keep) STEP(1, 1);
        else if (last) STEP(1, 0);
        else if (keep) STEP(0, 1);
        else STEP(0, 0);
    }
    #undef CLEAR
}

IN_ROWS step_rows_backward(int last, int starts, int ends, const real *u, const real *before, const real *x,
                           const real *ds, const real *dlater, const real *p, const real *dmean, real *du, real *dw,
                           real *dp, count rows, count columns, rule z) {
    for (count row = 0; row < rows; row++) {
        count at = row * columns;
        real w_sum = 0, p_sum = 0;
        #pragma omp simd reduction(+:w_sum, p_sum)
        for (count j = 0; j < columns; j++) {
            count c = last ? j : 0;
            real dhm = ends ? 0 : z.leak * (dmean[c] + p[c] * dlater[at + j]);
            real hm = starts ? z.v_reset : hand_on(before[at + j], z);
            real d = fire_backward(u[at + j], ds[at + j], dhm, z), product = d * (hm - x[at + j]);
            du[at + j] = d;
            if (last) dw[j] += d, dp[j] += product;
            else w_sum += d, p_sum += product;
        }
        if (!last) dw[0] += w_sum, dp[0] += p_sum;
    }
}

// From U[t], U[t-1], X[t] and dS[t] to dU[t], and the sums over space of it, dw, and of its product with
// Hm[t-1] - X[t], dp. dlater, p, dmean: dU[t+1], p then, and what reaches Hm[t] through its mean. starts, ends: at the
// first and the last step, where there is no `before` and no `dlater`.
void step_backward(int last, int starts, int ends, const real *u, const real *before, const real *x, const real *ds,
                   const real *dlater, const real *p, const real *dmean, real *du, real *dw, real *dp, count B, count N,
                   count C, rule z) {
    #define CLEAR(k) dw[k] = dp[k] = 0
    #define BACK(last, starts, ends) step_rows_backward(last, starts, ends, u + start, before + start, x + start, \
        ds + start, dlater + start, p + i, dmean + i, du + start, dw + k, dp + k, rows, columns, z)
    #define WHEN(last)                         \
        if (!starts && !ends) BACK(last, 0, 0); \
        else if (!starts) BACK(last, 0, 1);     \
        else if (!ends) BACK(last, 1, 0);       \
        else BACK(last, 1, 1)
    EACH_PART
        if (last) { WHEN(1); } else { WHEN(0); }
    }
}

// The current (T, B, N, C) or (T, B, C, N), as T B matrices of rows.

static void row_products(const real *x, const real *v, real *out, count rows, count columns) {  // x v
    for (count i = 0; i < rows; i++, x += columns) {
        double total = 0;
        for (count start = 0; start < columns; start += SOME) {
            count end = columns - start < SOME ? columns : start + SOME;
            real sum = 0;
            #pragma omp simd reduction(+:sum)
            for (count j = start; j < end; j++) sum += x[j] * v[j];
            total += sum;
        }
        out[i] = total;
    }
}

static void sum_of_rows(const real *x, const real *w, real *out, count rows, count columns) {  // w x
    for (count j = 0; j < columns; j++) out[j] = 0;
    for (count left = 0; left < columns; left += SOME) {
        count width = columns - left < SOME ? columns - left : SOME;
        for (count top = 0; top < rows; top += ROWS) {
            real part[SOME] = {0};
            for (count i = top; i < rows && i < top + ROWS; i++) {
                const real *row = x + i * columns + left;
                real w_i = w[i];
                #pragma omp simd
                for (count j = 0; j < width; j++) part[j] += w_i * row[j];
            }
            for (count j = 0; j < width; j++) out[left + j] += part[j];
        }
    }
}

static void over_channels(int last, const real *x, const real *v, real *out, count N, count C) {
    if (last) row_products(x, v, out, N, C);
    else sum_of_rows(x, v, out, C, N);
}

static void over_space(int last, const real *x, const real *v, real *out, count N, count C) {
    if (last) sum_of_rows(x, v, out, N, C);
    else row_products(x, v, out, C, N);
}

// GC's attention k (T, B, N), eq. 7, and of the current the mean that k weighs, and the plain one, (T, B, C). The key's
// bias would cancel in the softmax.
void look(int last, const real *x, const real *key, real *k, real *context, real *mean, count TB, count N, count C) {
    #pragma omp parallel for
    for (count i = 0; i < TB; i++) {
        const real *x_i = x + i * N * C;
        real *k_i = k + i * N, largest = -INFINITY;
        double sum = 0;
        for (count n = 0; n < N; n++) k_i[n] = (real)1 / N;
        over_space(last, x_i, k_i, mean + i * C, N, C);
        over_channels(last, x_i, key, k_i, N, C);
        for (count n = 0; n < N; n++) largest = k_i[n] > largest ? k_i[n] : largest;
        for (count n = 0; n < N; n++) sum += k_i[n] = exp(k_i[n] - largest);
        for (count n = 0; n < N; n++) k_i[n] /= sum;
        over_space(last, x_i, k_i, context + i * C, N, C);
    }
}

// The gradient of x, in the place of du: q dU, and what comes through GC's attention and the mean. dcontext, dmean
// (T, B, C). dlogits (T, B, N) and dkey (T, B, C): the gradients of k before the softmax, and of the key.
void look_backward(int last, const real *x, const real *k, const real *key, const real *dcontext, const real *dmean,
                   const real *q, real *du, real *dlogits, real *dkey, count TB, count N, count C) {
    #pragma omp parallel for
    for (count i = 0; i < TB; i++) {
        const real *x_i = x + i * N * C, *k_i = k + i * N, *q_i = q + i * C;
        const real *dc = dcontext + i * C, *dm = dmean + i * C;
        real *dx = du + i * N * C, *dl = dlogits + i * N;
        double mean = 0;
        over_channels(last, x_i, dc, dl, N, C);
        for (count n = 0; n < N; n++) mean += k_i[n] * dl[n];
        for (count n = 0; n < N; n++) dl[n] = k_i[n] * (dl[n] - mean);
        over_space(last, x_i, dl, dkey + i * C, N, C);
        if (last) for (count n = 0; n < N; n++, dx += C) {
            real k_n = k_i[n], dl_n = dl[n];
            #pragma omp simd
            for (count c = 0; c < C; c++) dx[c] = q_i[c] * dx[c] + k_n * dc[c] + dl_n * key[c] + dm[c];
        }
        else for (count c = 0; c < C; c++, dx += N) {
            real q_c = q_i[c], dc_c = dc[c], key_c = key[c], dm_c = dm[c];
            #pragma omp simd
            for (count n = 0; n < N; n++) dx[n] = q_c * dx[n] + k_i[n] * dc_c + dl[n] * key_c + dm_c;
        }
    }
}
