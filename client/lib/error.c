/**
 * The sentence that the last failed call of a thread left, and the texts of statuses.
 *
 * One buffer a thread, in thread-local memory of the library: nothing to free, no lock, and a text stays as it is
 * until the same thread fails again.
 */
#include "internal.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char error_text[512];

enum kvp_status kvp_fail(enum kvp_status status, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(error_text, sizeof(error_text), format, args);
    va_end(args);
    return status;
}

const char *kvp_error_text(void)
{
    return error_text;
}

const char *kvp_strerror(enum kvp_status status)
{
    return kvp_status_text(status);
}

const char *kvp_version(void)
{
    return KVPOOL_VERSION;
}
