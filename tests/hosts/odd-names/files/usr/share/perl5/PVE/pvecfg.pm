package PVE::pvecfg;

use strict;
use warnings;

use base 'Exporter';
our @EXPORT_OK = qw(version);

sub package {
    return 'pve-manager';
}

sub version {
    return '9.0.11';
}

sub release {
    return '9.0';
}

sub repoid {
    return 'abcdef0123456789';
}

1;
