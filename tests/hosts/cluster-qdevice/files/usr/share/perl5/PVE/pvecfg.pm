package PVE::pvecfg;
sub version {
    return '9.1.2';
}
1;
