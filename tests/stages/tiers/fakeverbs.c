/* A stand-in for libibverbs, for tests only.
 *
 * InfiniStore's server opens an RDMA device when it starts, and ends where there is none, though it
 * serves TCP as well. Preloaded into it, this library shows one InfiniBand port and "registers"
 * memory. Nothing can be sent over it: whatever would make a queue pair fails with ENOSYS.
 *
 *     cc -shared -fPIC -O2 -o libfakeverbs.so fakeverbs.c
 *
 * Layouts are those of libibverbs' public header; only what the server reads is filled in.
 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { PORT_ACTIVE = 4, MTU_4096 = 5, LINK_INFINIBAND = 1, PORT_ATTR_BYTES = 48 };

struct memory_region { /* struct ibv_mr */
    void *context, *domain, *address;
    size_t length;
    uint32_t handle, local_key, remote_key;
};

/* Opaque to the server. All zero, so that the header's inline functions take no extended path. */
static char device[4096], context[4096], domain[4096];
static void *devices[] = {device, NULL};

void **ibv_get_device_list(int *count)
{
    if (count)
        *count = 1;
    return devices;
}

void ibv_free_device_list(void **list) { (void)list; }

const char *ibv_get_device_name(void *which)
{
    (void)which;
    return "fake0";
}

void *ibv_open_device(void *which)
{
    (void)which;
    return context;
}

int ibv_close_device(void *which)
{
    (void)which;
    return 0;
}

int ibv_query_port(void *which, uint8_t port, void *attributes)
{
    uint8_t *attr = attributes;
    uint32_t state = PORT_ACTIVE, mtu = MTU_4096;
    uint16_t lid = 1;

    (void)which, (void)port;
    memset(attr, 0, PORT_ATTR_BYTES);
    memcpy(attr, &state, sizeof state);
    memcpy(attr + 4, &mtu, sizeof mtu); /* max_mtu */
    memcpy(attr + 8, &mtu, sizeof mtu); /* active_mtu */
    memcpy(attr + 34, &lid, sizeof lid);
    attr[46] = LINK_INFINIBAND;
    return 0;
}

int ibv_query_gid(void *which, uint8_t port, int index, void *gid)
{
    (void)which, (void)port, (void)index;
    memset(gid, 1, 16);
    return 0;
}

void *ibv_alloc_pd(void *which)
{
    memcpy(domain, &which, sizeof which); /* its first field points back */
    return domain;
}

int ibv_dealloc_pd(void *which)
{
    (void)which;
    return 0;
}

void *ibv_reg_mr(void *pd, void *address, size_t length, int access)
{
    struct memory_region *region = calloc(1, sizeof *region);

    (void)access;
    if (region) {
        region->context = context;
        region->domain = pd;
        region->address = address;
        region->length = length;
        region->local_key = region->remote_key = 7;
    }
    return region;
}

void *ibv_reg_mr_iova2(void *pd, void *address, size_t length, uint64_t iova, unsigned access)
{
    (void)iova;
    return ibv_reg_mr(pd, address, length, (int)access);
}

int ibv_dereg_mr(void *region)
{
    free(region);
    return 0;
}

static void *refuse(void)
{
    errno = ENOSYS;
    return NULL;
}

void *ibv_create_comp_channel(void *which)
{
    (void)which;
    return refuse();
}

void *ibv_create_cq(void *which, int entries, void *data, void *channel, int vector)
{
    (void)which, (void)entries, (void)data, (void)channel, (void)vector;
    return refuse();
}

void *ibv_create_qp(void *pd, void *attributes)
{
    (void)pd, (void)attributes;
    return refuse();
}
