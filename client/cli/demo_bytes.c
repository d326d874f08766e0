/**
 * The demo's K/V bytes: a row of 64-bit words that count up in odd steps from a mix of content key, plane and position,
 * so that no two rows are alike, any row can be made again by who checks it, and making it runs at memory speed.
 */
#include "demo.h"

#include <string.h>

#define WORDS (DEMO_ROW_BYTES / sizeof(uint64_t))
#define STEP  0x9e3779b97f4a7c15ull /* 2^64 divided by the golden ratio, odd */

/* The finaliser of splitmix64: every bit of what goes in moves every bit of what comes out. */
static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static uint64_t first_word(uint64_t key, uint32_t plane, uint32_t position)
{
    return mix(mix(key + STEP) ^ ((uint64_t)plane << 32 | position));
}

void demo_fill(void *row, uint64_t key, uint32_t plane, uint32_t position)
{
    uint64_t word = first_word(key, plane, position);
    uint64_t *words = row;

    for (size_t i = 0; i < WORDS; i++)
        words[i] = word + i * STEP;
}

uint64_t demo_count_bad(const void *row, uint64_t key, uint32_t plane, uint32_t position)
{
    uint64_t word = first_word(key, plane, position), differ = 0, bad = 0;
    const uint64_t *words = row;
    uint64_t expected[WORDS];

    for (size_t i = 0; i < WORDS; i++)
        differ |= words[i] ^ (word + i * STEP);
    if (differ == 0)
        return 0;
    demo_fill(expected, key, plane, position);
    for (size_t i = 0; i < DEMO_ROW_BYTES; i++)
        bad += ((const unsigned char *)row)[i] != ((const unsigned char *)expected)[i];
    return bad;
}
