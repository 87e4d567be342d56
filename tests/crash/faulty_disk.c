// A library to preload: lets file system calls on paths below one folder fail. tests/crash/faulty_disk.py builds it.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

static struct {
    char call[24];
    int error;
    long after, times, seen;
} faults[16];
static int count;
static char root[PATH_MAX];

// Set the faults, and forget those before: "call:errno:after:times ...". So many calls succeed first, and so many fail.
void set_faults(const char *folder, const char *text)
{
    int length = 0;
    count = 0;
    snprintf(root, sizeof root, "%s", folder);
    memset(faults, 0, sizeof faults);
    while (count < 16 && sscanf(text, " %23[^:]:%d:%ld:%ld%n", faults[count].call, &faults[count].error,
                                &faults[count].after, &faults[count].times, &length) == 4) {
        text += length;
        count++;
    }
}

// Return how many calls have failed since the faults were set.
long calls_failed(void)
{
    long failed = 0;
    for (int i = 0; i < count; i++) {
        long since = faults[i].seen - faults[i].after;
        failed += since < 0 ? 0 : since < faults[i].times ? since : faults[i].times;
    }
    return failed;
}

static int fails(const char *call, const char *path)
{
    if (!count || strncmp(path, root, strlen(root)))
        return 0;
    for (int i = 0; i < count; i++) {
        if (strcmp(faults[i].call, call))
            continue;
        long seen = __sync_fetch_and_add(&faults[i].seen, 1);
        if (seen >= faults[i].after && seen < faults[i].after + faults[i].times) {
            errno = faults[i].error;
            return 1;
        }
    }
    return 0;
}

static const char *path_of(int descriptor, char *out)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    out[length < 0 ? 0 : length] = 0;
    return out;
}

static const char *absolute(int folder, const char *path, char *out)
{
    if (path[0] == '/' || folder == AT_FDCWD)
        return path;
    path_of(folder, out);
    size_t length = strlen(out);
    snprintf(out + length, PATH_MAX - length, "/%s", path);
    return out;
}

static int is_folder(const char *path)
{
    struct stat status;
    return !lstat(path, &status) && S_ISDIR(status.st_mode);
}

#define REAL(result, name, ...)                                    \
    static result (*real)(__VA_ARGS__);                            \
    if (!real)                                                     \
        real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)
#define ON_DESCRIPTOR(call) (count && fails(call, path_of(descriptor, (char[PATH_MAX]){0})))
#define ON_PATH(call, folder, path) (count && fails(call, absolute(folder, path, (char[PATH_MAX]){0})))

int fsync(int descriptor)
{
    REAL(int, fsync, int);
    char path[PATH_MAX];
    if (count && fails(is_folder(path_of(descriptor, path)) ? "fsync-folder" : "fsync", path))
        return -1;
    return real(descriptor);
}

int close(int descriptor)
{
    REAL(int, close, int);
    if (ON_DESCRIPTOR("close")) {
        int error = errno;
        real(descriptor);
        errno = error;
        return -1;
    }
    return real(descriptor);
}

ssize_t pwrite64(int descriptor, const void *bytes, size_t size, off64_t offset)
{
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    struct stat status;
    if (ON_DESCRIPTOR("write"))
        return -1;
    if (count && !fstat(descriptor, &status) && offset != status.st_size && ON_DESCRIPTOR("write-at"))
        return -1;
    return real(descriptor, bytes, size, offset);
}

ssize_t preadv64v2(int descriptor, const struct iovec *pieces, int number, off64_t offset, int flags)
{
    REAL(ssize_t, preadv64v2, int, const struct iovec *, int, off64_t, int);
    return ON_DESCRIPTOR("read") ? -1 : real(descriptor, pieces, number, offset, flags);
}

ssize_t preadv64(int descriptor, const struct iovec *pieces, int number, off64_t offset)
{
    REAL(ssize_t, preadv64, int, const struct iovec *, int, off64_t);
    return ON_DESCRIPTOR("read") ? -1 : real(descriptor, pieces, number, offset);
}

int fallocate64(int descriptor, int mode, off64_t offset, off64_t size)
{
    REAL(int, fallocate64, int, int, off64_t, off64_t);
    return ON_DESCRIPTOR("preallocate") ? -1 : real(descriptor, mode, offset, size);
}

int openat64(int folder, const char *path, int flags, ...)
{
    REAL(int, openat64, int, const char *, int, ...);
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    if (!(flags & O_DIRECTORY) && ON_PATH(flags & O_CREAT ? "create" : "open", folder, path))
        return -1;
    return real(folder, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return openat64(AT_FDCWD, path, flags, mode);
}

int renameat2(int folder, const char *path, int new_folder, const char *new_path, unsigned flags)
{
    REAL(int, renameat2, int, const char *, int, const char *, unsigned);
    char whole[PATH_MAX];
    if (ON_PATH(is_folder(absolute(folder, path, whole)) ? "rename-folder" : "rename", folder, path))
        return -1;
    return real(folder, path, new_folder, new_path, flags);
}

int rename(const char *path, const char *new_path) { return renameat2(AT_FDCWD, path, AT_FDCWD, new_path, 0); }

int renameat(int folder, const char *path, int new_folder, const char *new_path)
{
    return renameat2(folder, path, new_folder, new_path, 0);
}

int unlinkat(int folder, const char *path, int flags)
{
    REAL(int, unlinkat, int, const char *, int);
    return ON_PATH(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path) ? -1 : real(folder, path, flags);
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }

int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char *path, mode_t mode)
{
    REAL(int, mkdirat, int, const char *, mode_t);
    return ON_PATH("mkdir", folder, path) ? -1 : real(folder, path, mode);
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

DIR *opendir(const char *path)
{
    REAL(DIR *, opendir, const char *);
    return ON_PATH("list", AT_FDCWD, path) ? NULL : real(path);
}

DIR *fdopendir(int descriptor)
{
    REAL(DIR *, fdopendir, int);
    return ON_DESCRIPTOR("list") ? NULL : real(descriptor);
}

int statvfs64(const char *path, struct statvfs64 *found)
{
    REAL(int, statvfs64, const char *, struct statvfs64 *);
    return ON_PATH("free-space", AT_FDCWD, path) ? -1 : real(path, found);
}
