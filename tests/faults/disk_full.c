/* A disk that is full for some of the writes below one folder; to be loaded by LD_PRELOAD and armed by disk_full(). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char place[4096];
static long count, first, last;

void disk_full(const char *where, long from, long to) {
    strncpy(place, where, sizeof place - 1);
    count = 0, first = from, last = to;
}

long disk_writes(void) { return count; }

static int is_full(const char *path) {
    if (!place[0] || strncmp(path, place, strlen(place)) != 0) return 0;
    long now = __sync_add_and_fetch(&count, 1);
    return now >= first && now <= last;
}

static int is_full_for(int fd) {
    char link[64], path[4096];
    if (!place[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_full(path);
}

static int is_full_below(const char *path) {
    char whole[8192];
    if (!place[0]) return 0;
    if (path[0] == '/') return is_full(path);
    if (!getcwd(whole, 4096)) return 0;
    strcat(whole, "/");
    strncat(whole, path, 4000);
    return is_full(whole);
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define REFUSE_IF(full) if (full) { errno = ENOSPC; return -1; }

ssize_t write(int fd, const void *content, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    REFUSE_IF(is_full_for(fd))
    return real(fd, content, size);
}

ssize_t writev(int fd, const struct iovec *parts, int number) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    REFUSE_IF(is_full_for(fd))
    return real(fd, parts, number);
}

ssize_t pwrite(int fd, const void *content, size_t size, off_t at) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    REFUSE_IF(is_full_for(fd))
    return real(fd, content, size, at);
}

ssize_t pwrite64(int fd, const void *content, size_t size, off64_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    REFUSE_IF(is_full_for(fd))
    return real(fd, content, size, at);
}

int fsync(int fd) {
    REAL(int, "fsync", int);
    REFUSE_IF(is_full_for(fd))
    return real(fd);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    REFUSE_IF(is_full_below(path))
    return real(path, mode);
}

#define OPENING(name)                                                    \
    int name(const char *path, int flags, ...) {                         \
        REAL(int, #name, const char *, int, ...);                        \
        mode_t mode = 0;                                                 \
        if (flags & (O_CREAT | O_TMPFILE)) {                             \
            va_list rest;                                                \
            va_start(rest, flags);                                       \
            mode = va_arg(rest, mode_t);                                 \
            va_end(rest);                                                \
        }                                                                \
        if (flags & O_CREAT) REFUSE_IF(is_full_below(path))              \
        return real(path, flags, mode);                                  \
    }

OPENING(open)
OPENING(open64)
