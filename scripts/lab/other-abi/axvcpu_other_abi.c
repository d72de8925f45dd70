// SPDX-License-Identifier: GPL-2.0-only
/*
 * A /dev/axvcpu that speaks an ABI version nobody has: for the test that axvmm
 * says so. It answers the one ioctl whose number never changes (INFO, type 0xa7,
 * number 0), whose structure starts with the version.
 */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/uaccess.h>

static long other_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	void __user *to = (void __user *)arg;
	u32 version = 0x7fffffff;

	if (_IOC_TYPE(cmd) != 0xa7 || _IOC_NR(cmd) != 0 || _IOC_SIZE(cmd) < sizeof(version))
		return -ENOTTY;
	if (clear_user(to, _IOC_SIZE(cmd)) || copy_to_user(to, &version, sizeof(version)))
		return -EFAULT;
	return 0;
}

static const struct file_operations other_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = other_ioctl,
};

static struct miscdevice other_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "axvcpu",
	.fops = &other_fops,
};
module_misc_device(other_device);

MODULE_DESCRIPTION("A /dev/axvcpu of another ABI version, for a test");
MODULE_LICENSE("GPL");
