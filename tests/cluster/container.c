/*
 * Stand-in for Pyxis, for tests: the container's filesystem. See spank_container.c.
 */

#define _GNU_SOURCE
#include "container.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

int failed(const char *format, ...)
{
	char message[2048];
	va_list args;

	va_start(args, format);
	vsnprintf(message, sizeof message, format, args);
	va_end(args);
	slurm_error("pyxis: %s", message);
	return -1;
}

int enroot_failed(const char *stage, const char *format, ...)
{
	char message[2048];
	va_list args;

	va_start(args, format);
	vsnprintf(message, sizeof message, format, args);
	va_end(args);
	slurm_error("pyxis: container %s failed with error code: 1", stage);
	slurm_error("pyxis: printing enroot log file:");
	return failed("    %s", message);
}

/* -------------------------------------------------------------------------------------- pieces */

/* Makes a directory, or an empty file when `file`, with the directories above it. */
static int create(const char *path, bool file)
{
	char partial[4096];

	for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		snprintf(partial, sizeof partial, "%.*s", (int)(slash - path), path);
		if (mkdir(partial, 0755) && errno != EEXIST)
			return -1;
	}
	if (!file)
		return mkdir(path, 0755) && errno != EEXIST ? -1 : 0;
	int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
	return fd < 0 ? -1 : close(fd);
}

/* Mounts a squashfs file through a loop device that the kernel frees together with the mount. */
static int mount_squashfs(int image, const char *where)
{
	struct loop_config config = {.fd = image, .info.lo_flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR};
	int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	int rc = -1;

	for (int attempt = 0; control >= 0 && attempt < 100; attempt++) {
		char device[64];
		snprintf(device, sizeof device, "/dev/loop%d", ioctl(control, LOOP_CTL_GET_FREE));
		int loop = open(device, O_RDONLY | O_CLOEXEC);
		if (loop >= 0 && ioctl(loop, LOOP_CONFIGURE, &config) == 0) {
			rc = mount(device, where, "squashfs", MS_RDONLY | MS_NODEV, NULL);
			close(loop);
			break;
		}
		if (loop >= 0)
			close(loop);
		usleep(10000); /* another task took this device: ask for the next */
	}
	if (control >= 0)
		close(control);
	return rc;
}

static int copy_tree(const char *path, bool recursive)
{
	return open_tree(AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (recursive ? AT_RECURSIVE : 0));
}

/* Attaches a copied mount in the container; the target is made if it is missing. */
static int attach(int tree, const char *target, bool read_only)
{
	struct mount_attr attributes = {.attr_set = MOUNT_ATTR_RDONLY};
	struct stat status;

	if (fstat(tree, &status) || create(target, !S_ISDIR(status.st_mode)))
		return -1;
	if (read_only && mount_setattr(tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attributes, sizeof attributes))
		return -1;
	return move_mount(tree, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH);
}

char *read_file(const char *path)
{
	FILE *file = fopen(path, "re");
	char *content = NULL;
	size_t size = 0;

	if (!file)
		return strdup("");
	if (getdelim(&content, &size, '\0', file) < 0 && content)
		content[0] = '\0';
	fclose(file);
	return content ? content : strdup("");
}

void write_file(const char *path, const char *mode, const char *content)
{
	FILE *file = fopen(path, mode);

	if (file) {
		fputs(content, file);
		fclose(file);
	}
}

/* ----------------------------------------------------------------------------------- container */

/* Opened as the job's user: whether the image may be read is not for root to decide. */
int open_image(const char *path)
{
	char magic[4] = "";

	if (path[0] != '/' && path[0] != '.') {
		enroot_failed("import", "[ERROR] Could not resolve host: registry-1.docker.io");
		return failed("failed to import docker image");
	}
	int image = open(path, O_RDONLY | O_CLOEXEC);
	if (image < 0) {
		failed("failed to create container filesystem for image: %s", path);
		return enroot_failed("creation", "[ERROR] %s: %s", strerror(errno), path);
	}
	if (read(image, magic, sizeof magic) != sizeof magic || memcmp(magic, "hsqs", sizeof magic)) {
		failed("failed to create container filesystem for image: %s", path);
		return enroot_failed("creation", "[ERROR] Invalid image format: %s", path);
	}
	return image;
}

int check_sources(const struct container *container)
{
	for (int i = 0; i < container->bind_count; i++) {
		const struct bind *bind = &container->binds[i];
		if (access(bind->source, F_OK) && !bind->optional)
			return failed("--container-mounts: source path does not exist: %s", bind->source);
	}
	return 0;
}

/* The staging directory gets a file system of its own, with the image under an overlay at "root". */
static int prepare_root(const struct container *container, int image, const char *staging)
{
	if (mount("tmpfs", staging, "tmpfs", 0, "mode=755") || chdir(staging) || mkdir("lower", 0755) ||
	    mkdir("upper", 0755) || mkdir("work", 0755) || mkdir("root", 0755))
		return failed("couldn't prepare %s: %m", staging);
	if (mount_squashfs(image, "lower")) {
		failed("failed to create container filesystem for image: %s", container->image);
		return enroot_failed("creation", "FATAL ERROR: File system corruption detected");
	}
	if (mount("overlay", "root", "overlay", 0, "lowerdir=lower,upperdir=upper,workdir=work"))
		return failed("couldn't mount the overlay: %m");
	return 0;
}

/* The host's name service, and an account for the job's user if the image has none. */
static void write_etc(const char *hosts, const char *resolver, const struct account *user)
{
	char *known = read_file("/etc/passwd"), ids[64];

	create("/etc", false);
	write_file("/etc/hosts", "we", hosts);
	write_file("/etc/resolv.conf", "we", resolver);
	snprintf(ids, sizeof ids, ":%u:%u:", user->uid, user->gid);
	if (!strstr(known, ids))
		write_file("/etc/passwd", "ae", user->entry);
	free(known);
}

/*
 * Leaves the process in the container's root, with all mounts in place. Needs root. The host's mounts
 * are copied before and attached after the change of root, so that no link in the image leads out.
 */
int enter_container(struct container *container, int image, const char *staging, const struct account *user)
{
	static const char *const system[] = {"/proc", "/sys", "/dev"};
	char *hosts = read_file("/etc/hosts"), *resolver = read_file("/etc/resolv.conf");
	struct mount_attr read_only = {.attr_set = MOUNT_ATTR_RDONLY};
	int trees[3];

	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return failed("couldn't unshare the mount namespace: %m");
	for (int i = 0; i < 3; i++)
		if ((trees[i] = copy_tree(system[i], true)) < 0)
			return failed("couldn't copy the mount of %s: %m", system[i]);
	for (int i = 0; i < container->bind_count; i++) {
		struct bind *bind = &container->binds[i];
		bind->tree = copy_tree(bind->source, bind->recursive);
		if (bind->tree < 0 && !bind->optional)
			return enroot_failed("start", "enroot-mount: failed to mount: %s: %m", bind->source);
	}
	if (prepare_root(container, image, staging))
		return -1;
	if (chdir("root") || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
		return failed("couldn't enter the container: %m");

	for (int i = 0; i < 3; i++)
		if (attach(trees[i], system[i], false))
			return failed("couldn't mount %s: %m", system[i]);
	create("/tmp", false);
	if (mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"))
		return failed("couldn't mount /tmp: %m");
	write_etc(hosts, resolver, user);
	for (int i = 0; i < container->bind_count; i++) {
		struct bind *bind = &container->binds[i];
		if (bind->tree >= 0 && attach(bind->tree, bind->target, bind->read_only))
			return enroot_failed("start", "enroot-mount: failed to mount: %s at %s: %m", bind->source,
					     bind->target);
	}
	if (!container->writable && mount_setattr(AT_FDCWD, "/", 0, &read_only, sizeof read_only))
		return failed("couldn't make the container read-only: %m");
	free(hosts);
	free(resolver);
	return 0;
}
