/* Fails the Nth call of a kind on the files below a folder: preloaded by the tests that use it, armed by what they run. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

enum { WRITE = 1, SYNC = 2, TRUNCATE = 4, UNLINK = 8, ALLOCATE = 16, MAP = 32, OPEN = 64 };

static char folder[4096];
static int kinds, error;
static atomic_long first, last, count, hits;

/* From now on the calls number `nth` to `nth + times - 1` of `wanted` below `below` fail with `number`. */
void shim_arm(const char *below, int wanted, long nth, long times, int number)
{
    snprintf(folder, sizeof folder, "%s", below);
    error = number;
    first = nth;
    last = nth + times - 1;
    count = hits = 0;
    kinds = wanted;
}

/* How many calls have failed. */
long shim_hits(void)
{
    return hits;
}

static int fails_path(int kind, const char *path)
{
    if (!(kinds & kind) || strncmp(path, folder, strlen(folder)) != 0)
        return 0;
    long number = ++count;
    if (number < first || number > last)
        return 0;
    hits++;
    errno = error;
    return 1;
}

static int fails(int kind, int fd)
{
    char link[64], path[4096];
    if (!(kinds & kind))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return fails_path(kind, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* For reading and writing: for reading alone none fails. */
#define OPENS(name)                                                                                                    \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        if ((flags & O_ACCMODE) == O_RDWR && fails_path(OPEN, path))                                                   \
            return -1;                                                                                                 \
        return REAL(name)(path, flags, mode);                                                                          \
    }

OPENS(open)
OPENS(open64)

ssize_t write(int fd, const void *data, size_t size)
{
    return fails(WRITE, fd) ? -1 : REAL(write)(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
    return fails(WRITE, fd) ? -1 : REAL(pwrite)(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    return fails(WRITE, fd) ? -1 : REAL(pwrite64)(fd, data, size, at);
}

int fsync(int fd)
{
    return fails(SYNC, fd) ? -1 : REAL(fsync)(fd);
}

int fdatasync(int fd)
{
    return fails(SYNC, fd) ? -1 : REAL(fdatasync)(fd);
}

int ftruncate(int fd, off_t size)
{
    return fails(TRUNCATE, fd) ? -1 : REAL(ftruncate)(fd, size);
}

int ftruncate64(int fd, off64_t size)
{
    return fails(TRUNCATE, fd) ? -1 : REAL(ftruncate64)(fd, size);
}

int unlink(const char *path)
{
    return fails_path(UNLINK, path) ? -1 : REAL(unlink)(path);
}

void *mmap(void *at, size_t size, int access, int flags, int fd, off_t from)
{
    return fails(MAP, fd) ? MAP_FAILED : REAL(mmap)(at, size, access, flags, fd, from);
}

void *mmap64(void *at, size_t size, int access, int flags, int fd, off64_t from)
{
    return fails(MAP, fd) ? MAP_FAILED : REAL(mmap64)(at, size, access, flags, fd, from);
}

int posix_fallocate(int fd, off_t at, off_t size);
int posix_fallocate64(int fd, off64_t at, off64_t size);

int posix_fallocate(int fd, off_t at, off_t size)
{
    return fails(ALLOCATE, fd) ? error : REAL(posix_fallocate)(fd, at, size);
}

int posix_fallocate64(int fd, off64_t at, off64_t size)
{
    return fails(ALLOCATE, fd) ? error : REAL(posix_fallocate64)(fd, at, size);
}
