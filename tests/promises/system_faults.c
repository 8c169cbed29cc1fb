/* Lets the n-th call of one system function fail that concerns files below a folder. Preloaded by test_system_faults.py.

   faults_begin("fsync", "/tmp/folder", 3, EIO, 1) lets the third fsync there fail, and with the last argument all after
   it. With n = 0 nothing fails and the calls are counted: faults_seen() says how many there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char function[32], folder[1024];
static int number, code, stays, seen;

void faults_begin(const char *name, const char *below, int n, int error, int and_after)
{
    snprintf(function, sizeof function, "%s", name);
    snprintf(folder, sizeof folder, "%s", below);
    number = n;
    code = error;
    stays = and_after;
    seen = 0;
}

int faults_seen(void) { return seen; }

static int is_below(int descriptor)
{
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    return strstr(path, folder) != NULL;
}

static int fails(const char *name, int concerns)
{
    if (!function[0] || strcmp(function, name) || !concerns)
        return 0;
    seen++;
    if (!number || seen < number || (seen > number && !stays))
        return 0;
    errno = code;
    return 1;
}

/* Looks at the arguments only if this function is meant: reading a link for every write would be slow. */
#define IS(name) (function[0] && !strcmp(function, name))
#define NEXT(name) static __typeof__(&name) next; if (!next) next = dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t length)
{
    NEXT(write);
    return IS("write") && fails("write", is_below(fd)) ? -1 : next(fd, data, length);
}

int fsync(int fd)
{
    NEXT(fsync);
    return IS("fsync") && fails("fsync", is_below(fd)) ? -1 : next(fd);
}

int close(int fd)
{
    NEXT(close);
    int concerns = IS("close") && is_below(fd);
    int result = next(fd);
    return fails("close", concerns) ? -1 : result;
}

int rename(const char *from, const char *to)
{
    NEXT(rename);
    return fails("rename", strstr(from, folder) != NULL) ? -1 : next(from, to);
}

int unlink(const char *path)
{
    NEXT(unlink);
    return fails("unlink", strstr(path, folder) != NULL) ? -1 : next(path);
}

int unlinkat(int fd, const char *path, int flags)
{
    NEXT(unlinkat);
    /* Called with names relative to a folder that is open. */
    return IS("unlink") && fails("unlink", fd < 0 ? strstr(path, folder) != NULL : is_below(fd)) ? -1 : next(fd, path, flags);
}

int mkdir(const char *path, mode_t mode)
{
    NEXT(mkdir);
    return fails("mkdir", strstr(path, folder) != NULL) ? -1 : next(path, mode);
}

static mode_t mode_of(int flags, va_list rest)
{
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

int open(const char *path, int flags, ...)
{
    NEXT(open);
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    return fails("open", strstr(path, folder) != NULL) ? -1 : next(path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    NEXT(open64);
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    return fails("open", strstr(path, folder) != NULL) ? -1 : next(path, flags, mode);
}
