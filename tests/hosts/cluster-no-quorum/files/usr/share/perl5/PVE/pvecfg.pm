package PVE::pvecfg;

use strict;
use warnings;

use base 'Exporter';
our @EXPORT_OK = qw(version);

sub package {
    return 'pve-manager';
}

sub version {
    return '8.4.14';
}

sub release {
    return '8.4';
}

sub repoid {
    return 'abcdef0123456789';
}

1;
