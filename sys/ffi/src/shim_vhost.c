/* vhost-user-blk controllers. Sessions are private to lib/vhost, hence its internal header. See shim.h. */
#include "shim.h"
#include "vhost_internal.h"

extern bool g_vhost_used;	/* shim_app.c */

int
ps_vhost_blk_create(const char *name, const char *cpumask, const char *bdev, bool readonly, bool packed_ring)
{
	char text[64];
	struct spdk_json_val values[8];
	void *end;
	ssize_t count;

	g_vhost_used = true;
	/* The public call takes its options as parsed JSON. */
	snprintf(text, sizeof(text), "{\"readonly\":%s,\"packed_ring\":%s}",
		 readonly ? "true" : "false", packed_ring ? "true" : "false");
	count = spdk_json_parse(text, strlen(text), values, SPDK_COUNTOF(values), &end, 0);
	if (count < 0) {
		return -EINVAL;
	}
	return spdk_vhost_blk_construct(name, cpumask, bdev, "vhost_user_blk", values);
}

int
ps_vhost_remove(const char *name)
{
	struct spdk_vhost_dev *dev;

	spdk_vhost_lock();
	dev = spdk_vhost_dev_find(name);
	spdk_vhost_unlock();
	if (dev == NULL) {
		return -ENODEV;
	}
	/* Takes the lock itself. Only the app thread removes controllers, so dev cannot go in between. */
	return spdk_vhost_dev_remove(dev);
}

int
ps_vhost_sessions(const char *name)
{
	struct spdk_vhost_user_dev *user_dev;
	struct spdk_vhost_session *session;
	struct spdk_vhost_dev *dev;
	int count = 0;

	spdk_vhost_lock();
	dev = spdk_vhost_dev_find(name);
	if (dev == NULL) {
		spdk_vhost_unlock();
		return -ENODEV;
	}
	user_dev = to_user_dev(dev);
	pthread_mutex_lock(&user_dev->lock);
	TAILQ_FOREACH(session, &user_dev->vsessions, tailq) {
		count++;
	}
	pthread_mutex_unlock(&user_dev->lock);
	spdk_vhost_unlock();
	return count;
}
