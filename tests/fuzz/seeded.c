/**
 * Runs a fuzz target without libFuzzer: inputs from a seed, half of them of any bytes, half shaped like protobuf (tags,
 * lengths, nested pieces), so that every build and compiler meets the target in ctest.
 *
 * KVPOOL_FUZZ_RUNS: how many inputs, 20 000. The seed is test_seed's, and printed.
 */
#include "seed.h"

#include <stdint.h>

#define INPUT_BYTES_MAX 2048

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t state;

static uint64_t draw(void) /* splitmix64 */
{
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static size_t varint(uint8_t *to, uint64_t value)
{
    size_t n = 0;

    do {
        to[n++] = (uint8_t)((value & 0x7f) | (value > 0x7f ? 0x80 : 0));
        value >>= 7;
    } while (value != 0);
    return n;
}

/* Fields of a message in at most `room` bytes. */
static size_t fields(uint8_t *to, size_t room, unsigned depth)
{
    size_t n = 0;

    while (n + 24 < room && draw() % 8 != 0) {
        unsigned wire = (unsigned[]){0, 1, 2, 2, 2, 5}[draw() % 6];

        n += varint(to + n, (draw() % 24 + 1) << 3 | wire);
        if (wire == 0) {
            n += varint(to + n, draw() >> draw() % 64);
        } else if (wire == 2) {
            size_t most = room - n - 4, length = draw() % (most < 40 ? most : 40), inside = length;

            if (depth > 0 && draw() % 2 == 0)
                inside = length = fields(to + n + 1, length < 100 ? length : 100, depth - 1);
            if (draw() % 64 == 0)
                length += draw() % 100; /* more than there is */
            n += varint(to + n, length < 128 ? length : 127);
            if (depth == 0 || inside != length)
                for (size_t i = 0; i < inside; i++)
                    to[n + i] = draw() % 3 != 0 ? (uint8_t)('a' + draw() % 26) : (uint8_t)draw();
            n += inside;
        } else {
            for (unsigned i = 0; i < (wire == 1 ? 8u : 4u); i++)
                to[n++] = (uint8_t)draw();
        }
    }
    return n;
}

static size_t make(uint8_t *to)
{
    size_t n = 1;

    to[0] = (uint8_t)draw();
    if (draw() % 2 == 0)
        return n + fields(to + n, INPUT_BYTES_MAX - n, 3);
    for (size_t length = draw() % 200; n <= length; n++)
        to[n] = (uint8_t)draw();
    return n;
}

int main(void)
{
    const char *runs = getenv("KVPOOL_FUZZ_RUNS");
    unsigned long n = runs != NULL ? strtoul(runs, NULL, 0) : 20000;
    static uint8_t input[INPUT_BYTES_MAX + 256];

    state = test_seed();
    printf("KVPOOL_TEST_SEED=%" PRIu64 ", %lu inputs\n", state, n);
    fflush(stdout);
    for (unsigned long i = 0; i < n; i++)
        LLVMFuzzerTestOneInput(input, make(input));
    return 0;
}
