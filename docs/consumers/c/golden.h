/* golden.h: reads exported golden cases, judges answers, answers single requests.

   Keep this file; replace the ops of consumer.c. C99, standard library only. Include it in one source file.

   What it reads: the folder written by `refllm golden export DIR --format raw`, or one request of
   `refllm golden verify --format raw --exec PROGRAM`. Both are text of the same form:

       op quant.rtn
       param bits 4
       input w f32 2 2 8 w.in.bin                       name, dtype, number of axes, the axes, file
       expect scale f16 2 2 1 scale.out.bin class=bits */
#ifndef GOLDEN_H
#define GOLDEN_H
#ifndef _CRT_SECURE_NO_WARNINGS
#define _CRT_SECURE_NO_WARNINGS /* MSVC: fopen and sscanf are meant */
#endif
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GOLDEN_OK = 0, GOLDEN_UNSUPPORTED = 3, GOLDEN_REJECTED = 4 }; /* what an op returns; also exit codes */
enum { EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_NOTHING = 3, EXIT_DAMAGED = 4 };
enum { MAX_AXES = 8, MAX_ITEMS = 64, LINE_LENGTH = 1 << 16 };

/* A dtype: bytes an element, sign bit (0: none), and the first and last magnitude that is NaN (first > last: none). */
typedef struct {
    const char *name;
    int size;
    uint64_t sign, nan_first, nan_last;
} golden_type;

static const golden_type golden_types[] = {
    {"f16", 2, 0x8000, 0x7c01, 0x7fff},
    {"bf16", 2, 0x8000, 0x7f81, 0x7fff},
    {"f32", 4, 0x80000000u, 0x7f800001u, 0x7fffffffu},
    {"f64", 8, UINT64_C(1) << 63, UINT64_C(0x7ff0000000000001), UINT64_C(0x7fffffffffffffff)},
    {"f8_e4m3fn", 1, 0x80, 0x7f, 0x7f}, {"f8_e5m2", 1, 0x80, 0x7d, 0x7f},
    {"f8_e4m3fnuz", 1, 0, 0x80, 0x80},  {"f8_e5m2fnuz", 1, 0, 0x80, 0x80},
    {"f8_e8m0fnu", 1, 0, 0xff, 0xff},   {"f6_e2m3fn", 1, 0x20, 1, 0},
    {"f6_e3m2fn", 1, 0x20, 1, 0},       {"f4_e2m1fn", 1, 0x08, 1, 0},
    {"bool", 1, 0, 1, 0}, {"u8", 1, 0, 1, 0},  {"i8", 1, 0, 1, 0},  {"u4", 1, 0, 1, 0},  {"i4", 1, 0, 1, 0},
    {"u2", 1, 0, 1, 0},   {"i2", 1, 0, 1, 0},  {"u16", 2, 0, 1, 0}, {"i16", 2, 0, 1, 0}, {"u32", 4, 0, 1, 0},
    {"i32", 4, 0, 1, 0},  {"u64", 8, 0, 1, 0}, {"i64", 8, 0, 1, 0}, {"bytes", 1, 0, 1, 0}, {"utf8", 1, 0, 1, 0},
};

typedef struct {
    char name[64], file[512];
    char rest[512]; /* of an expected array: class=... and what else stands behind the file name */
    const golden_type *type;
    int axes;
    size_t shape[MAX_AXES], count;
    void *data; /* native byte order, C order */
} golden_tensor;

typedef struct {
    char folder[1024], suite[128], id[32], op[64], result[16], comment[256];
    char param_name[MAX_ITEMS][64], param_value[MAX_ITEMS][256], needs[MAX_ITEMS][64];
    int params, inputs, expects, outputs, requires;
    golden_tensor input[MAX_ITEMS], expect[MAX_ITEMS], output[MAX_ITEMS];
} golden_case;

typedef int (*golden_op)(golden_case *c); /* GOLDEN_OK, GOLDEN_UNSUPPORTED or GOLDEN_REJECTED */

/* ---- what an op uses -------------------------------------------------------------------------------------------- */

/* A param as text, strings without their quotes; "" if the case does not have it. */
static inline const char *golden_text(const golden_case *c, const char *name) {
    for (int i = 0; i < c->params; i++)
        if (!strcmp(c->param_name[i], name)) return c->param_value[i];
    return "";
}

static inline long golden_int(const golden_case *c, const char *name) {
    const char *text = golden_text(c, name);
    return !strcmp(text, "true") ? 1 : atol(text);
}

/* An input array, or NULL if the case does not have it. */
static inline const golden_tensor *golden_input(const golden_case *c, const char *name) {
    for (int i = 0; i < c->inputs; i++)
        if (!strcmp(c->input[i].name, name)) return &c->input[i];
    return NULL;
}

static void golden_stop(const char *what, const char *name) {
    fprintf(stderr, "golden: %s: %s\n", what, name);
    exit(EXIT_DAMAGED);
}

static const golden_type *golden_find_type(const char *name) {
    for (size_t i = 0; i < sizeof golden_types / sizeof *golden_types; i++)
        if (!strcmp(golden_types[i].name, name)) return &golden_types[i];
    golden_stop("unknown dtype", name);
    return NULL;
}

/* A new output array, zeros; returns its data. */
static inline void *golden_output(golden_case *c, const char *name, const char *type, int axes, const size_t *shape) {
    if (c->outputs == MAX_ITEMS || axes > MAX_AXES) golden_stop("too many outputs or axes", name);
    golden_tensor *t = &c->output[c->outputs++];
    snprintf(t->name, sizeof t->name, "%s", name);
    t->type = golden_find_type(type);
    t->count = 1;
    for (t->axes = 0; t->axes < axes; t->axes++) t->count *= t->shape[t->axes] = shape[t->axes];
    t->data = calloc(t->count + 1, (size_t)t->type->size);
    if (!t->data) golden_stop("out of memory", name);
    return t->data;
}

/* ---- files ------------------------------------------------------------------------------------------------------ */

static FILE *golden_open(const char *folder, const char *file, const char *mode) {
    char path[2048];
    snprintf(path, sizeof path, "%s%s%s", folder, *folder ? "/" : "", file);
    FILE *f = fopen(path, mode);
    if (!f) golden_stop("cannot open", path);
    return f;
}

/* Between little-endian and the machine's order, in place. */
static void golden_swap(golden_tensor *t) {
    const uint16_t probe = 1;
    const size_t size = (size_t)t->type->size;
    if (*(const unsigned char *)&probe) return;
    for (unsigned char *p = t->data, *end = p + t->count * size; p < end; p += size)
        for (size_t i = 0; i < size / 2; i++) {
            unsigned char byte = p[i];
            p[i] = p[size - 1 - i];
            p[size - 1 - i] = byte;
        }
}

/* "name dtype axes sizes... file rest" and the file it names. */
static void golden_read_tensor(golden_tensor *t, const char *folder, const char *text) {
    char type[32];
    int used = 0;
    if (sscanf(text, "%63s %31s %d%n", t->name, type, &t->axes, &used) != 3 || t->axes < 0 || t->axes > MAX_AXES)
        golden_stop("not an array", text);
    t->type = golden_find_type(type);
    t->count = 1;
    for (int i = 0; i < t->axes; i++) {
        char *end;
        t->shape[i] = (size_t)strtoul(text + used, &end, 10);
        t->count *= t->shape[i];
        used = (int)(end - text);
    }
    t->rest[0] = 0;
    if (sscanf(text + used, " %511s %511[^\n]", t->file, t->rest) < 1) golden_stop("an array without a file", text);
    FILE *f = golden_open(folder, t->file, "rb");
    t->data = malloc((t->count + 1) * (size_t)t->type->size);
    if (!t->data) golden_stop("out of memory", t->name);
    if (fread(t->data, (size_t)t->type->size, t->count, f) != t->count || fgetc(f) != EOF)
        golden_stop("wrong size", t->file);
    fclose(f);
    golden_swap(t);
}

/* Takes quotes and the end of the line off. */
static void golden_value(char *to, size_t size, const char *from) {
    size_t n = strcspn(from, "\r\n");
    const int quoted = n > 1 && from[0] == '"' && from[n - 1] == '"';
    snprintf(to, size, "%.*s", (int)(n - 2 * (size_t)quoted), from + quoted);
}

static void golden_read_case(golden_case *c, const char *folder, const char *file) {
    static char line[LINE_LENGTH];
    memset(c, 0, sizeof *c);
    snprintf(c->folder, sizeof c->folder, "%s", folder);
    FILE *f = golden_open(folder, file, "r");
    while (fgets(line, sizeof line, f)) {
        char key[16];
        int used = 0;
        if (!strchr(line, '\n')) golden_stop("a line is too long or cut off", folder);
        if (sscanf(line, "%15s %n", key, &used) != 1) continue;
        const char *text = line + used;
        if (c->inputs == MAX_ITEMS || c->expects == MAX_ITEMS || c->params == MAX_ITEMS || c->requires == MAX_ITEMS)
            golden_stop("too many items", folder);
        if (!strcmp(key, "suite")) golden_value(c->suite, sizeof c->suite, text);
        else if (!strcmp(key, "id")) golden_value(c->id, sizeof c->id, text);
        else if (!strcmp(key, "op")) golden_value(c->op, sizeof c->op, text);
        else if (!strcmp(key, "result")) golden_value(c->result, sizeof c->result, text);
        else if (!strcmp(key, "comment")) golden_value(c->comment, sizeof c->comment, text);
        else if (!strcmp(key, "requires")) golden_value(c->needs[c->requires++], 64, text);
        else if (!strcmp(key, "param")) {
            if (sscanf(text, "%63s %n", c->param_name[c->params], &used) != 1) golden_stop("not a param", text);
            golden_value(c->param_value[c->params++], 256, text + used);
        }
        else if (!strcmp(key, "input")) golden_read_tensor(&c->input[c->inputs++], folder, text);
        else if (!strcmp(key, "expect") || !strcmp(key, "variant"))
            golden_read_tensor(&c->expect[c->expects++], folder, text);
    }
    fclose(f);
}

static void golden_free_case(golden_case *c) {
    for (int i = 0; i < c->inputs; i++) free(c->input[i].data);
    for (int i = 0; i < c->expects; i++) free(c->expect[i].data);
    for (int i = 0; i < c->outputs; i++) free(c->output[i].data);
}

/* ---- comparing --------------------------------------------------------------------------------------------------- */

static uint64_t golden_bits(const golden_tensor *t, size_t i) {
    switch (t->type->size) {
        case 1: return ((const uint8_t *)t->data)[i];
        case 2: return ((const uint16_t *)t->data)[i];
        case 4: return ((const uint32_t *)t->data)[i];
        default: return ((const uint64_t *)t->data)[i];
    }
}

/* f16, bf16, f32 or f64 as double; other dtypes as their code. */
static double golden_number(const golden_tensor *t, size_t i) {
    const uint64_t bits = golden_bits(t, i);
    if (!strcmp(t->type->name, "f64")) return ((const double *)t->data)[i];
    if (!strcmp(t->type->name, "f32")) return ((const float *)t->data)[i];
    const int fraction = !strcmp(t->type->name, "f16") ? 10 : !strcmp(t->type->name, "bf16") ? 7 : 0;
    if (!fraction) return (double)bits;
    const int top = (1 << (15 - fraction)) - 1, field = (int)(bits >> fraction) & top;
    const double part = (double)(bits & ((1u << fraction) - 1)), one = (double)(1 << fraction);
    double value = field ? ldexp(one + part, field - top / 2 - fraction) : ldexp(part, 1 - top / 2 - fraction);
    if (field == top) value = part != 0 ? NAN : INFINITY;
    return bits & 0x8000 ? -value : value;
}

/* The value of key=value in `rest`, as text (in `buffer`), or NULL. */
static const char *golden_option(const char *rest, const char *key, char *buffer, size_t size) {
    const size_t n = strlen(key);
    for (const char *p = rest; p && *p; p = strchr(p, ' '), p = p ? p + 1 : NULL)
        if (!strncmp(p, key, n) && p[n] == '=') {
            snprintf(buffer, size, "%.*s", (int)strcspn(p + n + 1, " \r\n"), p + n + 1);
            return buffer;
        }
    return NULL;
}

static double golden_limit(const golden_tensor *expected, const char *key) {
    char text[64];
    return golden_option(expected->rest, key, text, sizeof text) ? strtod(text, NULL) : 0;
}

/* Is element i right? Classes: bits, ulp, allclose, dot_bound (S is the entry named by abs_ref). */
static int golden_right(const golden_tensor *got, const golden_tensor *want, const golden_tensor *S, size_t i) {
    char text[64], kind[64];
    const golden_type *type = want->type;
    golden_option(want->rest, "class", kind, sizeof kind);
    const uint64_t g = golden_bits(got, i), w = golden_bits(want, i);
    const uint64_t g_size = g & ~type->sign, w_size = w & ~type->sign;
    const int nans = (g_size >= type->nan_first && g_size <= type->nan_last) +
                     (w_size >= type->nan_first && w_size <= type->nan_last);
    const double y = golden_number(got, i), e = golden_number(want, i);
    const int zeros = g_size == 0 && w_size == 0;
    if (!strcmp(kind, "bits") || (!strcmp(kind, "ulp") && (nans || zeros))) {
        const char *nan = golden_option(want->rest, "nan", text, sizeof text);
        if (nans == 2 && (!nan || !strcmp(nan, "any"))) return 1;
        const char *zero = golden_option(want->rest, "zero_sign", text, sizeof text);
        if (zeros && zero && !strcmp(zero, "ignore")) return 1;
        return g == w;
    }
    if (!isfinite(y) || !isfinite(e)) return y == e || (isnan(y) && isnan(e));
    if (!strcmp(kind, "ulp")) {
        const uint64_t distance = (g ^ w) & type->sign ? g_size + w_size : g > w ? g - w : w - g;
        return (double)distance <= golden_limit(want, "max_ulp");
    }
    if (!strcmp(kind, "allclose"))
        return fabs(y - e) <= golden_limit(want, "atol") + golden_limit(want, "rtol") * fabs(e);
    if (strcmp(kind, "dot_bound") || !S) golden_stop("unknown comparison", want->rest);
    const char *unit = golden_option(want->rest, "unit", text, sizeof text);
    const int f32 = unit && !strcmp(unit, "f32"), f16 = unit && !strcmp(unit, "f16");
    const double k = golden_limit(want, "k"), ku = k * ldexp(1, f32 ? -24 : f16 ? -11 : -8);
    const double underflow = k * ldexp(1, f32 ? -149 : f16 ? -24 : -133);
    return fabs(y - e) <= golden_limit(want, "factor") * ku / (1 - ku) * golden_number(S, i) + underflow;
}

/* Root mean square and peak of the differences of finite values. */
static int golden_rms_peak(const golden_tensor *got, const golden_tensor *want) {
    double sum = 0, peak = 0, n = 0;
    for (size_t i = 0; i < want->count; i++) {
        const double y = golden_number(got, i), e = golden_number(want, i), d = fabs(y - e);
        if (!isfinite(y) != !isfinite(e)) return 0;
        if (isfinite(e)) sum += d * d, n += 1, peak = d > peak ? d : peak;
    }
    return !(n > 0 && sqrt(sum / n) > golden_limit(want, "rms")) && peak <= golden_limit(want, "peak");
}

/* Why an output is not as expected, in `why`; returns 1 if it is right. */
static int golden_compare(const golden_case *c, const golden_tensor *want, char *why, size_t size) {
    const golden_tensor *got = NULL, *S = NULL;
    char name[64], kind[64] = "";
    golden_option(want->rest, "class", kind, sizeof kind);
    for (int i = 0; i < c->outputs; i++)
        if (!strcmp(c->output[i].name, want->name)) got = &c->output[i];
    if (golden_option(want->rest, "abs_ref", name, sizeof name))
        for (int i = 0; i < c->expects; i++)
            if (!strcmp(c->expect[i].name, name)) S = &c->expect[i];
    snprintf(why, size, "missing");
    if (!got) return 0;
    const int bound = !strcmp(kind, "dot_bound"); /* the exact result stands there in f64 */
    snprintf(why, size, "dtype %s, expected %s", got->type->name, want->type->name);
    if (got->type->size != want->type->size && !bound) return 0;
    snprintf(why, size, "another shape");
    if (got->axes != want->axes || memcmp(got->shape, want->shape, (size_t)want->axes * sizeof *want->shape)) return 0;
    snprintf(why, size, "rms or peak too large");
    if (!strcmp(kind, "rms_peak")) return golden_rms_peak(got, want);
    size_t wrong = 0, first = 0;
    for (size_t i = want->count; i-- > 0;)
        if (!golden_right(got, want, S, i)) wrong++, first = i;
    if (wrong)
        snprintf(why, size, "%lu of %lu differ, first at %lu: got %.9g (0x%llx), expected %.9g (0x%llx)",
                 (unsigned long)wrong, (unsigned long)want->count, (unsigned long)first, golden_number(got, first),
                 (unsigned long long)golden_bits(got, first), golden_number(want, first),
                 (unsigned long long)golden_bits(want, first));
    return !wrong;
}

static int golden_declared(const char *item, size_t length, int n, char **declared) {
    for (int i = 0; i < n; i++)
        if (!strncmp(declared[i], item, length) && (declared[i][length] == 0 || declared[i][length] == '=')) return 1;
    return 0;
}

/* Do the declarations make this variant the right one? What is no option of the comparison is a convention. */
static int golden_fits(const golden_tensor *want, int n, char **declared) {
    static const char *const options[] = {"class=", "nan=", "zero_sign=", "max_ulp=", "rtol=", "atol=",
                                          "k=", "factor=", "abs_ref=", "unit=", "rms=", "peak="};
    for (const char *p = want->rest; *p;) {
        const size_t length = strcspn(p, " \r\n");
        int convention = length > 0;
        for (size_t i = 0; i < sizeof options / sizeof *options; i++)
            if (!strncmp(p, options[i], strlen(options[i]))) convention = 0;
        if (convention && !golden_declared(p, length, n, declared)) return 0;
        p += length + (p[length] != 0);
    }
    return 1;
}

/* 1 right, 0 wrong (printed). Of the variants of an output the declared one counts, else the first. */
static int golden_judge(const golden_case *c, int n, char **declared) {
    char why[256], name[64];
    int right = 1;
    for (int i = 0; i < c->expects; i++) {
        const golden_tensor *want = &c->expect[i];
        int chosen = i, skip = 0;
        for (int j = 0; j < c->expects; j++) { /* only the scale of a bound, or judged with its first variant? */
            const char *reference = golden_option(c->expect[j].rest, "abs_ref", name, sizeof name);
            skip |= (reference && !strcmp(reference, want->name)) || (j < i && !strcmp(c->expect[j].name, want->name));
        }
        if (skip) continue;
        for (int j = c->expects - 1; j >= i; j--)
            if (!strcmp(c->expect[j].name, want->name) && golden_fits(&c->expect[j], n, declared)) chosen = j;
        if (golden_compare(c, &c->expect[chosen], why, sizeof why)) continue;
        right = 0;
        printf("FAIL %s#%s  %s\n     %s: %s\n", c->suite, c->id, c->comment, want->name, why);
        for (int j = i; j < c->expects; j++) {
            if (j == chosen || strcmp(c->expect[j].name, want->name)) continue;
            if (golden_compare(c, &c->expect[j], why, sizeof why))
                printf("     right under another convention: %s\n", c->expect[j].rest);
        }
    }
    return right;
}

/* ---- running ----------------------------------------------------------------------------------------------------- */

static int golden_run_folder(const char *folder, golden_op answer, int n, char **declared) {
    static golden_case c;
    char line[512], path[1600], suite[128] = "";
    int passed = 0, failed = 0, skipped = 0, any_passed = 0, any_failed = 0, more;
    FILE *f = golden_open(folder, "cases.txt", "r");
    do {
        more = fgets(line, sizeof line, f) != NULL;
        if (more) {
            line[strcspn(line, "\r\n")] = 0;
            snprintf(path, sizeof path, "%s/%s", folder, line);
            golden_read_case(&c, path, "case.txt");
        }
        if ((!more || strcmp(suite, c.suite)) && *suite) {
            printf("%s: %d passed, %d failed, %d unsupported\n", suite, passed, failed, skipped);
            any_passed += passed, any_failed += failed, passed = failed = skipped = 0;
        }
        if (!more) break;
        snprintf(suite, sizeof suite, "%s", c.suite);
        int code = GOLDEN_OK;
        for (int i = 0; i < c.requires; i++)
            if (!golden_declared(c.needs[i], strlen(c.needs[i]), n, declared)) code = GOLDEN_UNSUPPORTED;
        if (code == GOLDEN_OK) code = answer(&c);
        int right;
        if (code == GOLDEN_UNSUPPORTED) skipped++;
        else {
            if (code == GOLDEN_OK && strcmp(c.result, "invalid")) right = golden_judge(&c, n, declared);
            else if (!(right = code == GOLDEN_REJECTED && strcmp(c.result, "valid")))
                printf("FAIL %s#%s  %s\n     %s\n", c.suite, c.id, c.comment,
                       code == GOLDEN_OK ? "an invalid input was accepted" : "a valid input was rejected");
            passed += right, failed += !right;
        }
        golden_free_case(&c);
    } while (more);
    fclose(f);
    return any_failed ? EXIT_FAILED : any_passed ? EXIT_SUCCESS : EXIT_NOTHING;
}

/* One request: FOLDER/args.txt says what to do, FOLDER/answer.txt names the outputs. */
static int golden_run_request(const char *path, golden_op answer) {
    static golden_case c;
    char folder[1024] = "", file[128];
    const char *slash = strrchr(path, '/'), *back = strrchr(path, '\\');
    if (!slash || (back && back > slash)) slash = back;
    if (slash) snprintf(folder, sizeof folder, "%.*s", (int)(slash - path), path);
    golden_read_case(&c, folder, slash ? slash + 1 : path);
    const int code = answer(&c);
    FILE *list = code == GOLDEN_OK ? golden_open(folder, "answer.txt", "w") : NULL;
    for (int i = 0; list && i < c.outputs; i++) {
        golden_tensor *t = &c.output[i];
        snprintf(file, sizeof file, "%s.out.bin", t->name);
        fprintf(list, "output %s %s %d", t->name, t->type->name, t->axes);
        for (int axis = 0; axis < t->axes; axis++) fprintf(list, " %lu", (unsigned long)t->shape[axis]);
        fprintf(list, " %s\n", file);
        golden_swap(t);
        FILE *f = golden_open(folder, file, "wb");
        const size_t written = fwrite(t->data, (size_t)t->type->size, t->count, f);
        if (written != t->count || fclose(f)) golden_stop("cannot write", file);
    }
    if (list && fclose(list)) golden_stop("cannot write", "answer.txt");
    golden_free_case(&c);
    return code;
}

/* PROGRAM FOLDER [KEY=VALUE ...] judges a folder of cases; PROGRAM .../args.txt answers one request, PROGRAM - those
   whose paths stand on standard input, with one line each: the code. */
static int golden_main(int argc, char **argv, golden_op answer) {
    char line[1024];
    if (argc < 2) {
        fprintf(stderr, "usage: %s FOLDER [KEY=VALUE ...]\n", argc ? argv[0] : "consumer");
        return EXIT_USAGE;
    }
    if (!strcmp(argv[1], "-")) {
        while (fgets(line, sizeof line, stdin)) {
            line[strcspn(line, "\r\n")] = 0;
            printf("%d\n", golden_run_request(line, answer));
            fflush(stdout);
        }
        return EXIT_SUCCESS;
    }
    const size_t n = strlen(argv[1]);
    if (n > 4 && !strcmp(argv[1] + n - 4, ".txt")) return golden_run_request(argv[1], answer);
    return golden_run_folder(argv[1], answer, argc - 2, argv + 2);
}
#endif
