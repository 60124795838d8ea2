// What is done to one map, or to one matrix of weights, by fused_cpu.c.
//
// A map is (N, C), `last`, where channels are last in memory, and (C, N) where not, with N places in space. Numbers are
// chosen by products: of choices a compiler makes jumps, and then it does not compute many numbers at once.

#include <string.h>

// Places whose numbers are summed up at once, of a map that is channels-last and of one that is not: a longer sum would
// be less exact.
#define ROWS 128
#define SOME 1024

typedef REAL real;
typedef long long count;

typedef struct {
    count last, T, B, N, C, J, H, M;  // J, H: sizes of GC's query and of SA's squeeze; M: of a row
    count first, end;                 // of the samples that are asked for
} sizes;

typedef struct {
    real v_th, v_reset, half, height;    // half, height: of eq. 5's rectangle
    real through;                        // 1 where a spike's gradient reaches Hm, which it resets, else 0
    real leak, rest;                     // Hm is handed on as leak Hm + rest
    real alpha, decay, total, offset;    // U = p Hm + q X + w, q = total - p, w = total added + offset + p slope
} rule;

// Sums.

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
        count size = columns - left < SOME ? columns - left : SOME;
        for (count top = 0; top < rows; top += ROWS) {
            real part[SOME] = {0};
            for (count i = top; i < rows && i < top + ROWS; i++) {
                const real *x_i = x + i * columns + left;
                real w_i = w[i];
                #pragma omp simd
                for (count j = 0; j < size; j++) part[j] += w_i * x_i[j];
            }
            for (count j = 0; j < size; j++) out[left + j] += part[j];
        }
    }
}

static void over_channels(const sizes *d, const real *x, const real *v, real *out) {
    if (d->last) row_products(x, v, out, d->N, d->C);
    else sum_of_rows(x, v, out, d->C, d->N);
}

static void over_space(const sizes *d, const real *x, const real *v, real *out) {
    if (d->last) sum_of_rows(x, v, out, d->N, d->C);
    else row_products(x, v, out, d->C, d->N);
}

static void linear(const real *weight, const real *bias, const real *x, real *y, count out, count in) {
    row_products(weight, x, y, out, in);
    for (count i = 0; i < out; i++) y[i] += bias[i];
}

// The neuron's rule.

static inline real fire(real u, rule z) {  // eq. 2
    return u - z.v_th >= 0 ? (real)1 : (real)0;
}

static inline real hand_on(real u, rule z) {  // eq. 3
    real s = fire(u, z);
    return z.leak * (u * (1 - s) + z.v_reset * s) + z.rest;
}

static inline real rectangle(real u, rule z) {  // eq. 5
    real v = u - z.v_th;
    return (v <= z.half) & (v >= -z.half) ? z.height : (real)0;
}

static inline real fire_backward(real u, real ds, real dhm, real slope, rule z) {  // eqs. 2 and 3
    return (ds + z.through * dhm * (z.v_reset - u)) * slope + dhm * (1 - fire(u, z));
}

#define IN_ROWS static inline __attribute__((always_inline)) void  // with constants for what is asked in the loops

IN_ROWS step_rows(int last, int keep, const real *x, real *hm, const real *p, const real *q, const real *w, real *out,
                  real *sums, count rows, count columns, rule z) {
    for (count i = 0; i < rows; i++, x += columns, hm += columns, out += columns) {
        real sum = 0;
        #pragma omp simd reduction(+:sum)
        for (count j = 0; j < columns; j++) {
            count c = last ? j : 0;
            real u = p[c] * hm[j] + q[c] * x[j] + w[c], next = hand_on(u, z);
            out[j] = keep ? u : fire(u, z);
            hm[j] = next;
            if (last) sums[j] += next;
            else sum += next;
        }
        if (!last) sums[0] += sum;
    }
}

IN_ROWS step_rows_backward(int last, int own, real first, const real *u, const real *before, const real *x,
                           const real *ds, const real *slopes, const real *dlater, const real *p, const real *dmean,
                           real *du, real *dw, real *dp, count rows, count columns, rule z) {
    for (count i = 0; i < rows; i++) {
        count at = i * columns;
        real w_sum = 0, p_sum = 0;
        #pragma omp simd reduction(+:w_sum, p_sum)
        for (count j = 0; j < columns; j++) {
            count c = last ? j : 0;
            real dhm = z.leak * (dmean[c] + p[c] * dlater[at + j]);
            real hm = first * z.v_reset + (1 - first) * hand_on(before[at + j], z);
            real slope = own ? slopes[at + j] : rectangle(u[at + j], z);
            real d = fire_backward(u[at + j], ds[at + j], dhm, slope, z), product = d * (hm - x[at + j]);
            du[at + j] = d;
            if (last) dw[j] += d, dp[j] += product;
            else w_sum += d, p_sum += product;
        }
        if (!last) dw[0] += w_sum, dp[0] += p_sum;
    }
}

// A map in parts; of each, (C,) numbers `a` and `b` are summed up by themselves.
#define EACH_PART(last, PART)                                                                  \
    for (count c = 0; c < (last ? 1 : C); c++)                                                 \
        for (count from = 0; from < N; from += last ? ROWS : SOME) {                           \
            count size = last ? ROWS : SOME, places = N - from < size ? N - from : size;       \
            count rows = last ? places : 1, columns = last ? C : places, all = last ? C : 1;   \
            count start = last ? from * C : c * N + from;                                      \
            memset(a, 0, all * sizeof(real)), memset(b, 0, all * sizeof(real));                \
            PART;                                                                              \
            for (count i = 0; i < all; i++) first[c + i] += a[i], second[c + i] += b[i];       \
        }

// From X[t] and Hm[t-1] to Hm[t], the sums of Hm[t] over space, and U[t] (keep) or S[t], into `out`.
static void step(const sizes *d, int keep, const real *x, real *hm, const real *p, const real *q, const real *w,
                 real *out, real *first, real *room, rule z) {
    count N = d->N, C = d->C;
    real *a = room, *b = room + C, *second = room + 2 * C;
    memset(first, 0, C * sizeof(real)), memset(second, 0, C * sizeof(real));  // of which nothing is asked
    #define STEP(last, keep) step_rows(last, keep, x + start, hm + start, p + c, q + c, w + c, out + start, a, rows, \
                                       columns, z)
    if (d->last && keep) EACH_PART(1, STEP(1, 1))
    else if (d->last) EACH_PART(1, STEP(1, 0))
    else if (keep) EACH_PART(0, STEP(0, 1))
    else EACH_PART(0, STEP(0, 0))
}

// From U[t], U[t-1] (`before`), X[t] and dS[t] to dU[t], and the sums over space of it, `first`, and of its product
// with Hm[t-1] - X[t], `second`. dlater, p, dmean: dU[t+1], p then, and what reaches Hm[t] through its mean; at the
// last step any map, and zeros. NULL are `before` at the first step, and slopes, dS/dU, where they are eq. 5's.
static void step_backward(const sizes *d, const real *u, const real *before, const real *x, const real *ds,
                          const real *slopes, const real *dlater, const real *p, const real *dmean, real *du,
                          real *first, real *second, real *room, rule z) {
    count N = d->N, C = d->C;
    real *a = room, *b = room + C, starts = !before;
    memset(first, 0, C * sizeof(real)), memset(second, 0, C * sizeof(real));
    before = before ? before : u;
    #define BACK(last, own, slopes) step_rows_backward(last, own, starts, u + start, before + start, x + start,  \
                                                       ds + start, slopes, dlater + start, p + c, dmean + c,    \
                                                       du + start, a, b, rows, columns, z)
    if (d->last && slopes) EACH_PART(1, BACK(1, 1, slopes + start))
    else if (d->last) EACH_PART(1, BACK(1, 0, NULL))
    else if (slopes) EACH_PART(0, BACK(0, 1, slopes + start))
    else EACH_PART(0, BACK(0, 0, NULL))
}
