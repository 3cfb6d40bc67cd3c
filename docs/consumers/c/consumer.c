/* consumer.c: a few formats and kernels, checked against refllm's golden cases. Replace the ops with yours.

       refllm golden export cases --format raw
       cc -O2 -Wall -Wextra -o consumer consumer.c -lm
       ./consumer cases

   Prints one line a suite. Exit code: 0 all right, 1 a case failed, 2 usage, 3 nothing ran, 4 the files are damaged. */
#include "golden.h"

static float half(const uint8_t *bytes) { /* little-endian float16 */
    const int bits = bytes[0] | bytes[1] << 8, field = bits >> 10 & 31, fraction = bits & 1023;
    const double size = field == 31  ? (fraction ? NAN : INFINITY)
                        : field ? ldexp(1024 + fraction, field - 25)
                                : ldexp(fraction, -24);
    return (float)(bits & 0x8000 ? -size : size);
}

static int nibble(uint8_t byte, int high) {
#ifdef SWAP_NIBBLES /* a mistake on request: refllm's tests compile this to see that it is caught */
    high = !high;
#endif
    return high ? byte >> 4 : byte & 15;
}

/* ---- small floats ------------------------------------------------------------------------------------------------ */

typedef struct {
    const char *name, *dtype;
    int sign, fraction_bits, bias;
    int max, infinity, nan; /* codes without the sign; -1: there is none */
} small_float;

static const small_float small_floats[] = {
    {"FP16", "f16", 0x8000, 10, 15, 0x7bff, 0x7c00, 0x7e00},
    {"BF16", "bf16", 0x8000, 7, 127, 0x7f7f, 0x7f80, 0x7fc0},
    {"TF32", "u32", 0x40000, 10, 127, 0x3fbff, 0x3fc00, 0x3fe00},
    {"FP8_E4M3FN", "f8_e4m3fn", 0x80, 3, 7, 0x7e, -1, 0x7f},
    {"FP8_E5M2", "f8_e5m2", 0x80, 2, 15, 0x7b, 0x7c, 0x7e},
    {"FP8_E4M3FNUZ", "f8_e4m3fnuz", 0x80, 3, 8, 0x7f, -1, 0x80}, /* NaN takes the place of -0 */
    {"FP8_E5M2FNUZ", "f8_e5m2fnuz", 0x80, 2, 16, 0x7f, -1, 0x80},
    {"FP6_E2M3", "f6_e2m3fn", 0x20, 3, 1, 0x1f, -1, -1},
    {"FP6_E3M2", "f6_e3m2fn", 0x20, 2, 3, 0x1f, -1, -1},
    {"FP4_E2M1", "f4_e2m1fn", 0x08, 1, 1, 0x07, -1, -1},
    {"UE4M3", "u8", 0, 3, 7, 0x7e, -1, 0x7f},
    {"E8M0", "f8_e8m0fnu", 0, 0, 127, 0xfe, -1, 0xff}, /* powers of two, no zero */
};

static const small_float *find_float(const char *name) {
    for (size_t i = 0; i < sizeof small_floats / sizeof *small_floats; i++)
        if (!strcmp(small_floats[i].name, name)) return &small_floats[i];
    return NULL;
}

static double float_value(const small_float *f, int code) {
    const int m = f->fraction_bits, size = code & ~f->sign, field = size >> m, fraction = size & ((1 << m) - 1);
    double value = ldexp(fraction + (field ? 1 << m : 0), (field ? field : 1) - f->bias - m);
    if (m == 0) value = ldexp(1, size - f->bias);
    if (size > f->max) value = size == f->infinity ? INFINITY : NAN;
    if (code == f->nan) return NAN;
    return code & f->sign ? -value : value;
}

/* Nearest, ties to even; beyond the largest number the largest, but infinity stays. -1: NaN where there is none. */
static int float_code(const small_float *f, double x) {
    const int m = f->fraction_bits, lowest = (m > 0) - f->bias, sign = signbit(x) ? f->sign : 0;
    int exponent;
    if (isnan(x) || (x < 0 && !f->sign)) return f->nan < 0 ? -1 : f->nan | (f->nan == f->sign ? 0 : sign);
    if (isinf(x)) return sign | (f->infinity < 0 ? f->max : f->infinity);
    frexp(x, &exponent); /* |x| = 0.5 ... 1 times 2^exponent */
    exponent = x == 0 || exponent - 1 < lowest ? lowest : exponent - 1;
    const double steps = ldexp(fabs(x), m - exponent);
    double code = nearbyint(steps) + ldexp(exponent - lowest, m);
    if (m == 0) code = exponent - lowest + (steps > 1.5 || (steps == 1.5 && (exponent - lowest) % 2));
    if (code == 0 && f->nan == f->sign) return 0;
    return sign | (code > f->max ? f->max : (int)code);
}

static int float_encode(golden_case *c) {
    const small_float *f = find_float(golden_text(c, "format"));
    const golden_tensor *x = golden_input(c, "x");
    if (!f) return GOLDEN_REJECTED;
    void *codes = golden_output(c, "codes", f->dtype, x->axes, x->shape);
    const int size = golden_find_type(f->dtype)->size;
    for (size_t i = 0; i < x->count; i++) {
        const int code = float_code(f, golden_number(x, i));
        if (code < 0) return GOLDEN_REJECTED;
        if (size == 1) ((uint8_t *)codes)[i] = (uint8_t)code;
        else if (size == 2) ((uint16_t *)codes)[i] = (uint16_t)code;
        else ((uint32_t *)codes)[i] = (uint32_t)code;
    }
    return GOLDEN_OK;
}

static int float_decode(golden_case *c) {
    const small_float *f = find_float(golden_text(c, "format"));
    const golden_tensor *codes = golden_input(c, "codes");
    if (!f) return GOLDEN_REJECTED;
    float *x = golden_output(c, "x", "f32", codes->axes, codes->shape);
    for (size_t i = 0; i < codes->count; i++) x[i] = (float)float_value(f, (int)golden_bits(codes, i));
    return GOLDEN_OK;
}

/* ---- GGUF blocks ------------------------------------------------------------------------------------------------- */

static void q4_0(const uint8_t *b, float *y) { /* d, 16 bytes of nibbles: j low, j + 16 high */
    for (int i = 0; i < 32; i++) y[i] = half(b) * (float)(nibble(b[2 + i % 16], i / 16) - 8);
}

static void q8_0(const uint8_t *b, float *y) {
    for (int i = 0; i < 32; i++) y[i] = half(b) * (float)(int8_t)b[2 + i];
}

static void mxfp4(const uint8_t *b, float *y) { /* exponent, nibbles as in q4_0; code 8 is +0 in GGUF: -0 + 0 */
    const small_float *e2m1 = find_float("FP4_E2M1");
    for (int i = 0; i < 32; i++)
        y[i] = (float)ldexp(float_value(e2m1, nibble(b[1 + i % 16], i / 16)), b[0] - 127) + 0.0f;
}

static void q4_k(const uint8_t *b, float *y) { /* d, dmin, 8 pairs of 6 bits in 12 bytes, nibbles in chunks of 64 */
    const uint8_t *s = b + 4;
    for (int i = 0; i < 256; i++) {
        const int j = i / 32;
        const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        const int min = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
        y[i] = half(b) * (float)scale * (float)nibble(b[16 + 32 * (i / 64) + i % 32], j % 2) - half(b + 2) * (float)min;
    }
}

static void q6_k(const uint8_t *b, float *y) { /* 128 bytes of low nibbles, 64 of high pairs, 16 scales, d */
    for (int i = 0; i < 256; i++) {
        const int h = i / 128, k = i % 128 / 32, l = i % 32;
        const int low = nibble(b[64 * h + 32 * (k % 2) + l], k / 2), high = b[128 + 32 * h + l] >> 2 * k & 3;
        y[i] = half(b + 208) * (float)(int8_t)b[192 + i / 16] * (float)((low | high << 4) - 32);
    }
}

static const struct {
    const char *name;
    size_t elements, bytes;
    void (*decode)(const uint8_t *block, float *y);
} blocks[] = {
    {"Q4_0", 32, 18, q4_0},   {"Q8_0", 32, 34, q8_0},   {"MXFP4", 32, 17, mxfp4},
    {"Q4_K", 256, 144, q4_k}, {"Q6_K", 256, 210, q6_k},
};

static int gguf_decode(golden_case *c) {
    const golden_tensor *in = golden_input(c, "blocks");
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
        if (strcmp(blocks[i].name, golden_text(c, "type"))) continue;
        if (!in->axes || in->shape[in->axes - 1] % blocks[i].bytes) return GOLDEN_REJECTED;
        size_t shape[MAX_AXES];
        memcpy(shape, in->shape, sizeof shape);
        shape[in->axes - 1] = shape[in->axes - 1] / blocks[i].bytes * blocks[i].elements;
        float *y = golden_output(c, "x", "f32", in->axes, shape);
        for (size_t b = 0; b < in->count / blocks[i].bytes; b++)
            blocks[i].decode((const uint8_t *)in->data + b * blocks[i].bytes, y + b * blocks[i].elements);
        return GOLDEN_OK;
    }
    return GOLDEN_UNSUPPORTED;
}

/* ---- checkpoints ------------------------------------------------------------------------------------------------- */

/* Code i of a stream of `bits`-bit codes in 32-bit words that lie `stride` apart. */
static int word_code(const uint32_t *words, size_t stride, size_t i, long bits) {
    const size_t at = i * (size_t)bits, word = at / 32, shift = at % 32;
    uint32_t code = words[word * stride] >> shift;
    if (shift + (size_t)bits > 32) code |= words[(word + 1) * stride] << (32 - shift);
    return (int)(code & ((1u << bits) - 1));
}

/* Nibble n of a word holds code 0 2 4 6 1 3 5 7. */
static int awq_code(const uint32_t *words, size_t i) {
    static const int place[] = {0, 4, 1, 5, 2, 6, 3, 7};
    const int n = place[i % 8];
    return nibble((uint8_t)(words[i / 8] >> 8 * (n / 2)), n % 2);
}

/* Both store matrices transposed. Unpacking gives codes, scales, zero points and weights as [out, ...]. */
static int unpack(golden_case *c, int awq_order) {
    const golden_tensor *q = golden_input(c, "qweight"), *z = golden_input(c, "qzeros"), *s = golden_input(c, "scales");
    const golden_tensor *index = golden_input(c, "g_idx");
    if (strcmp(golden_text(c, "direction"), "unpack")) return GOLDEN_UNSUPPORTED;
    if (!q || !z || !s || !s->count) return GOLDEN_REJECTED;
    const size_t bits = awq_order ? 4 : (size_t)golden_int(c, "bits"), groups = s->shape[0], out = s->shape[1];
    const size_t columns = awq_order ? q->shape[0] : q->shape[0] * 32 / bits, zero_width = out * bits / 32;
    const int v1 = !strcmp(golden_text(c, "checkpoint_format"), "gptq"); /* stores zero points minus one */
    if (q->shape[1] != (awq_order ? zero_width : out)) return GOLDEN_REJECTED;
    if (z->shape[0] != groups || z->shape[1] != zero_width) return GOLDEN_REJECTED;
    if (index ? index->count != columns : columns % groups != 0) return GOLDEN_REJECTED;
    uint8_t *codes = golden_output(c, "codes", "u8", 2, (const size_t[]){out, columns});
    uint8_t *zero_point = golden_output(c, "zero_point", "u8", 2, (const size_t[]){out, groups});
    uint16_t *scale = golden_output(c, "scale", "f16", 2, (const size_t[]){out, groups});
    float *w = golden_output(c, "w_hat", "f32", 2, (const size_t[]){out, columns});
    int32_t *g_idx = awq_order ? NULL : golden_output(c, "g_idx", "i32", 1, &columns);
    const uint32_t *words = q->data, *zeros = z->data;
    for (size_t o = 0; o < out; o++)
        for (size_t g = 0; g < groups; g++) {
            const uint32_t *row = zeros + g * zero_width;
            const int zero = awq_order ? awq_code(row, o) : word_code(row, 1, o, (long)bits) + v1;
            zero_point[o * groups + g] = (uint8_t)(zero & ((1 << bits) - 1));
            scale[o * groups + g] = ((uint16_t *)s->data)[g * out + o];
        }
    for (size_t i = 0; i < columns; i++) {
        const int32_t g = index ? ((int32_t *)index->data)[i] : (int32_t)(i / (columns / groups));
        if (g < 0 || (size_t)g >= groups) return GOLDEN_REJECTED;
        if (g_idx) g_idx[i] = g;
        for (size_t o = 0; o < out; o++) {
            const int code = awq_order ? awq_code(words + i * zero_width, o) : word_code(words + o, out, i, (long)bits);
            const float d = (float)golden_number(s, (size_t)g * out + o);
            codes[o * columns + i] = (uint8_t)code;
            w[o * columns + i] = d * (float)(code - zero_point[o * groups + (size_t)g]);
        }
    }
    return GOLDEN_OK;
}

static int gptq(golden_case *c) { return unpack(c, 0); }
static int awq(golden_case *c) { return unpack(c, 1); }

/* ---- a kernel: y = x w^T on packed integers ---------------------------------------------------------------------- */

/* Code i of a row that is one little-endian stream of `bits`-bit codes. */
static int stream_code(const uint8_t *row, size_t i, long bits) {
    int code = 0;
    for (long bit = 0; bit < bits; bit++) {
        const size_t at = i * (size_t)bits + (size_t)bit;
        code |= (row[at / 8] >> at % 8 & 1) << bit;
    }
    return code;
}

static int rtn_matmul(golden_case *c) {
    const golden_tensor *x = golden_input(c, "x"), *packed = golden_input(c, "packed");
    const golden_tensor *scale = golden_input(c, "scale"), *zeros = golden_input(c, "packed_zero_point");
    const long bits = golden_int(c, "bits"), group_size = golden_int(c, "group_size");
    const size_t columns = (size_t)golden_int(c, "columns"), tokens = x->shape[0], out = packed->shape[0];
    if (!columns) return GOLDEN_REJECTED;
    const size_t group = group_size > 0 ? (size_t)group_size : columns, groups = columns / group;
    const size_t width = (columns * (size_t)bits + 7) / 8, zero_width = (groups * (size_t)bits + 7) / 8;
    const int per_tensor = group_size == 0;
    if (columns % group || x->shape[1] != columns || packed->shape[1] != width) return GOLDEN_REJECTED;
    if (scale->shape[0] != (per_tensor ? 1 : out) || scale->shape[1] != groups) return GOLDEN_REJECTED;
    if (zeros && (zeros->shape[0] != scale->shape[0] || zeros->shape[1] != zero_width)) return GOLDEN_REJECTED;
    for (size_t i = 0; i < scale->count; i++)
        if (!isfinite(golden_number(scale, i))) return GOLDEN_REJECTED;
    float *y = golden_output(c, "y", "f32", 2, (const size_t[]){tokens, out});
    for (size_t t = 0; t < tokens; t++)
        for (size_t o = 0; o < out; o++) {
            float sum = 0;
            for (size_t i = 0; i < columns; i++) {
                const size_t row = per_tensor ? 0 : o, g = i / group;
                const int code = stream_code((uint8_t *)packed->data + o * width, i, bits);
                int zero = 1 << (bits - 1);
                if (zeros) zero = stream_code((uint8_t *)zeros->data + row * zero_width, g, bits);
                const float w = (float)golden_number(scale, row * groups + g) * (float)(code - zero);
                sum += ((float *)x->data)[t * columns + i] * w;
            }
            y[t * out + o] = sum;
        }
    return GOLDEN_OK;
}

static const struct {
    const char *name;
    golden_op run;
} ops[] = {
    {"formats.float.encode", float_encode}, {"formats.float.decode", float_decode},
    {"formats.gguf.decode", gguf_decode},   {"formats.gptq", gptq},
    {"formats.awq", awq},                   {"quant.rtn.matmul", rtn_matmul},
};

static int answer(golden_case *c) {
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
        if (!strcmp(ops[i].name, c->op)) return ops[i].run(c);
    return GOLDEN_UNSUPPORTED;
}

int main(int argc, char **argv) { return golden_main(argc, argv, answer); }
