/* Shared by the two halves of the stand-in for Pyxis: spank_container.c and container.c. */

#pragma once
#include <stdbool.h>
#include <sys/types.h>

#define MAX_MOUNTS 64

struct bind {
	char *source, *target;
	bool read_only, recursive, optional;
	int tree; /* a detached copy of the source's mount, attached once we are in the container */
};

struct account {
	uid_t uid;
	gid_t gid;
	char name[64], home[1024], entry[2048];
};

struct container {
	char *image;
	struct bind binds[MAX_MOUNTS];
	int bind_count;
	bool writable;
};

/* Messages to the user, in Pyxis's words; both return -1. `enroot_failed` is for what real Pyxis only
 * knows from the output of enroot, which it prints line by line. */
__attribute__((format(printf, 1, 2))) int failed(const char *format, ...);
__attribute__((format(printf, 2, 3))) int enroot_failed(const char *stage, const char *format, ...);

int open_image(const char *path);
int check_sources(const struct container *container);
int enter_container(struct container *container, int image, const char *staging, const struct account *user);

char *read_file(const char *path);
void write_file(const char *path, const char *mode, const char *content);
