/*
 * A disk that fails on command, for LD_PRELOAD: it stands between the gateway and the C library's file calls.
 *
 * It looks at the database and its WAL only. In the directory FAULTY_DISK
 *   fault       says what goes wrong, when it is there: "fsync EIO", "fsync stall", "pwrite EIO", "pwrite ENOSPC";
 *   NAME.undo   holds, for each file, what its writes since its last good sync replaced: with it a test can make of the
 *               file what a power cut may leave, as nothing of these writes need be on the disk, and any part of them may.
 *
 * After a failed sync the file is again as at its last good one: what the kernel could not write it may forget. A good sync
 * goes no further, as it is not the machine that is stopped.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct record {
    int64_t offset, length, size_before; /* and then `length` bytes as they were */
};

enum { DATABASE, WAL, FILES };
static const char *const names[FILES] = {"tidegate.db", "tidegate.db-wal"};
static int undo_files[FILES] = {-1, -1};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static int (*real_ftruncate)(int, off_t);
static int (*real_fsync)(int);

__attribute__((constructor)) static void begin(void) {
    real_pwrite = dlsym(RTLD_NEXT, "pwrite64");
    real_ftruncate = dlsym(RTLD_NEXT, "ftruncate64");
    real_fsync = dlsym(RTLD_NEXT, "fsync");
}

/* Which of the files a descriptor is of; -1 for any other. */
static int file_of(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return -1;
    path[length] = 0;
    const char *base = strrchr(path, '/');
    for (int file = 0; base && file < FILES; file++)
        if (!strcmp(base + 1, names[file])) return file;
    return -1;
}

/* Whether the fault is set, as in "fsync EIO". */
static int fault_is(const char *fault) {
    char path[PATH_MAX], said[64];
    snprintf(path, sizeof path, "%s/fault", getenv("FAULTY_DISK"));
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t length = read(fd, said, sizeof said);
    close(fd);
    return length == (ssize_t)strlen(fault) && !memcmp(said, fault, length);
}

static int undo_of(int file) {
    if (undo_files[file] < 0) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%s/%s.undo", getenv("FAULTY_DISK"), names[file]);
        undo_files[file] = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (undo_files[file] < 0) abort();
    }
    return undo_files[file];
}

static int64_t size_of(int fd) {
    struct stat status;
    if (fstat(fd, &status)) abort();
    return status.st_size;
}

/* Notes what is about to be replaced. */
static void remember(int file, int fd, int64_t offset, int64_t length) {
    int64_t size = size_of(fd);
    if (offset + length > size) length = offset < size ? size - offset : 0;
    char *bytes = malloc(sizeof(struct record) + length);
    *(struct record *)bytes = (struct record){offset, length, size};
    length += sizeof(struct record);
    if (pread(fd, bytes + sizeof(struct record), length - sizeof(struct record), offset) < 0) abort();
    /* In one call, so that a kill leaves all of it or nothing. */
    if (write(undo_of(file), bytes, length) != length) abort();
    free(bytes);
}

/* Makes the file what it was at its last good sync. */
static void forget(int file, int fd) {
    int undo = undo_of(file);
    int64_t size = size_of(undo), count = 0;
    char *bytes = malloc(size + 1);
    int64_t *starts = malloc((size / sizeof(struct record) + 1) * sizeof *starts);
    if (pread(undo, bytes, size, 0) != size) abort();
    for (int64_t at = 0; at < size; at += sizeof(struct record) + ((struct record *)(bytes + at))->length) starts[count++] = at;
    while (count-- > 0) {
        struct record record;
        memcpy(&record, bytes + starts[count], sizeof record);
        if (real_pwrite(fd, bytes + starts[count] + sizeof record, record.length, record.offset) != record.length) abort();
        if (real_ftruncate(fd, record.size_before)) abort();
    }
    if (real_ftruncate(undo, 0)) abort();
    free(starts);
    free(bytes);
}

static ssize_t shim_pwrite(int fd, const void *bytes, size_t length, off_t offset) {
    int file = file_of(fd);
    if (file < 0) return real_pwrite(fd, bytes, length, offset);
    if (fault_is("pwrite EIO")) return errno = EIO, -1;
    if (fault_is("pwrite ENOSPC")) {
        /* A disk is full in the middle of something: half of it goes in, of that which is left the half again. */
        if (length < 1024) return errno = ENOSPC, -1;
        length /= 2;
    }
    pthread_mutex_lock(&lock);
    remember(file, fd, offset, length);
    ssize_t written = real_pwrite(fd, bytes, length, offset);
    pthread_mutex_unlock(&lock);
    return written;
}

static int shim_ftruncate(int fd, off_t size) {
    int file = file_of(fd);
    if (file < 0) return real_ftruncate(fd, size);
    pthread_mutex_lock(&lock);
    remember(file, fd, size, INT64_MAX / 2);
    int result = real_ftruncate(fd, size);
    pthread_mutex_unlock(&lock);
    return result;
}

static int shim_fsync(int fd) {
    int file = file_of(fd);
    if (file < 0) return real_fsync(fd);
    while (fault_is("fsync stall")) usleep(1000);
    pthread_mutex_lock(&lock);
    int failed = fault_is("fsync EIO");
    if (failed)
        forget(file, fd);
    else if (real_ftruncate(undo_of(file), 0))
        abort();
    pthread_mutex_unlock(&lock);
    return failed ? (errno = EIO, -1) : 0;
}

/* All the names that the calls go by. */
ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) { return shim_pwrite(fd, bytes, length, offset); }
ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t offset) { return shim_pwrite(fd, bytes, length, offset); }
int ftruncate(int fd, off_t size) { return shim_ftruncate(fd, size); }
int ftruncate64(int fd, off64_t size) { return shim_ftruncate(fd, size); }
int fsync(int fd) { return shim_fsync(fd); }
int fdatasync(int fd) { return shim_fsync(fd); }
